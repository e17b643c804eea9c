"""GaLore: the shared case in each of its forms."""

import formulas
import torch

from lowdim.optim import GaLore
from lowdim.testing.optimizer_case import OptimizerCase


class TestAdamW(OptimizerCase):
    def make(self, params, **options):
        return GaLore(params, **{"lr": 0.1, "rank": 3, "update_interval": self.update_interval, **options})

    def bases(self, grad):
        return formulas.sided(grad, formulas.shorter(grad), 3)

    def direction(self, g, state, step):
        """`η D`."""
        return formulas.step_size(step, 0.1) * formulas.adam_outside(g, state)

    def update(self, grad, state, step, projected):
        """`g = Lᵀ G R`, and `0.25 η L D Rᵀ`; unprojected `η D`."""
        if not projected:
            return self.direction(grad, state, step)
        if step % 3 == 0:
            state["L"], state["R"] = self.bases(grad)
        L, R = state["L"], state["R"]
        return 0.25 * L @ self.direction(L.mT @ grad @ R, state, step) @ R.mT

    def reference_step(self, weight, grad, state, step, projected):
        """Decay comes after the update."""
        return (1 - 0.1 * self.decay) * (weight - self.update(grad, state, step, projected))


class TestReverse(TestAdamW):
    def bases(self, grad):
        return formulas.sided(grad, "left" if formulas.shorter(grad) == "right" else "right", 3)

    def make(self, params, **options):
        return super().make(params, proj_type="reverse_std", **options)


class TestRight(TestAdamW):
    def bases(self, grad):
        return formulas.sided(grad, "right", 3)

    def make(self, params, **options):
        return super().make(params, proj_type="right", **options)


class TestLeft(TestAdamW):
    def bases(self, grad):
        return formulas.sided(grad, "left", 3)

    def make(self, params, **options):
        return super().make(params, proj_type="left", **options)


class TestFull(TestAdamW):
    def bases(self, grad):
        return formulas.leading(grad, "left", 4), formulas.leading(grad, "right", 4)

    def direction(self, g, state, step):
        return formulas.step_size(step, 0.2) * formulas.adam_outside(g, state)

    def reference_step(self, weight, grad, state, step, projected):
        return (1 - 0.2 * self.decay) * (weight - self.update(grad, state, step, projected))

    def make(self, params, **options):
        return super().make(params, **{"proj_type": "full", "rank": 4, "lr": 0.2, **options})


class TestUncorrected(TestAdamW):
    """Without bias correction η is the learning rate, here with an eps that matters."""

    def direction(self, g, state, step):
        return 0.1 * formulas.adam_outside(g, state, eps=0.01)

    def make(self, params, **options):
        return super().make(params, correct_bias=False, eps=0.01, **options)


class TestRandomized(TestAdamW):
    """The sketch, forced on small matrices; its old basis and its seed must survive a checkpoint."""

    # a sketch of a square matrix is near its singular vectors and no more; compared with them in the tests of linalg
    test_steps_are_those_of_the_formula = None  # type: ignore[assignment]

    def make(self, params, **options):
        return super().make(params, svd="randomized", **options)


class Test8bit(TestAdamW):
    formula = 1e-5  # moments are float32

    def direction(self, g, state, step):
        """Vectors of fewer than 16 entries keep moments in floating point."""
        adam = formulas.adam_in_bytes if g.numel() >= 16 else formulas.adam_inside
        return formulas.step_size(step, 0.1) * adam(g, state, step)

    def make(self, params, **options):
        return super().make(params, inner="adamw8bit", inner_options={"min_size": 16}, **options)


class Test16bit(TestAdamW):
    formula = 1e-2  # the second moment is rounded at random, within its last bit

    def direction(self, g, state, step):
        D = formulas.adam_outside(g, state)
        state["m"] = state["m"].bfloat16().double()
        return formulas.step_size(step, 0.1) * D

    def test_brings_the_loss_down_in_bfloat16(self):
        """Moments are bfloat16 on purpose; what matters is that they still add up."""
        net = self.model(torch.bfloat16)
        optimizer = self.make(self.groups(net))
        losses = self.run(net, optimizer, range(120), torch.bfloat16)
        assert sum(losses[-10:]) < 0.33 * sum(losses[:10]), losses[::10]
        assert optimizer.state[net[0].weight]["exp_avg_sq"].dtype == torch.bfloat16

    def make(self, params, **options):
        return super().make(params, inner="adamw16bit", **options)


class TestAdafactor(TestAdamW):
    def direction(self, g, state, step):
        """`β₂ = 1 − k^-0.8`, `u = g / √(row / mean(row)) / √col`, clipped to a root mean square of 1."""
        kept, q = 1 - (step + 1) ** -0.8, g**2 + 1e-30
        if g.ndim == 1:
            state["v"] = kept * state.get("v", 0) + (1 - kept) * q
            u = g / state["v"].sqrt()
        else:
            state["row"] = kept * state.get("row", 0) + (1 - kept) * q.mean(1)
            state["col"] = kept * state.get("col", 0) + (1 - kept) * q.mean(0)
            u = g / (state["row"] / state["row"].mean()).sqrt()[:, None] / state["col"].sqrt()
        return 0.1 * u / max(1.0, float(u.square().mean().sqrt()))

    def reference_step(self, weight, grad, state, step, projected):
        """Decay comes before the update."""
        return (1 - 0.1 * self.decay) * weight - self.update(grad, state, step, projected)

    def make(self, params, **options):
        return super().make(params, inner="adafactor", **options)


class TestAdafactorWithMomentum(TestAdafactor):
    # its momentum averages updates that already hold their learning rate, so a rate of zero leaves old updates under way
    test_schedulers_work_through_groups = None  # type: ignore[assignment]
    test_layerwise_follows_schedulers_after_loading = None  # type: ignore[assignment]

    def direction(self, g, state, step):
        state["e"] = 0.9 * state.get("e", 0) + 0.1 * super().direction(g, state, step)
        return state["e"]

    def make(self, params, **options):
        return super().make(params, inner_options={"beta1": 0.9}, **options)


class TestAdafactorRelative(TestAdafactor):
    """The step size is `min(0.01, 1 / √k) · max(0.001, rms(W))`, whatever the learning rate."""

    # it ignores the learning rate
    test_zero_rate_changes_nothing = None  # type: ignore[assignment]
    test_schedulers_work_through_groups = None  # type: ignore[assignment]
    test_layerwise_follows_schedulers_after_loading = None  # type: ignore[assignment]
    test_weight_decay_shrinks = None  # type: ignore[assignment]
    # steps of a hundredth of the weights are too small for the few steps of these
    test_brings_the_loss_down = None  # type: ignore[assignment]
    test_brings_the_loss_down_in_bfloat16 = None  # type: ignore[assignment]
    test_closure = None  # type: ignore[assignment]

    def reference_step(self, weight, grad, state, step, projected):
        size = min(0.01, (step + 1) ** -0.5) * max(0.001, float(weight.square().mean().sqrt()))
        update = self.update(grad, state, step, projected) / 0.1 * size
        return (1 - size * self.decay) * weight - update

    def make(self, params, **options):
        how = {"scale_parameter": True, "relative_step": True}
        return super().make(params, inner_options=how, **options)
