"""Shared by the tests of resuming: what ends a run in its middle."""

__all__ = ["Kill"]


class Kill:
    """A callback that raises when so many steps are done, as if the user had pressed Ctrl-C."""

    def __new__(cls, step):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise KeyboardInterrupt

        return Callback()
