"""Faults in optimizers and their parts."""

from mutants.planting import Fault, Tests


def of(name: str, keyword: str = "") -> Tests:
    """Tests of one file."""
    return Tests((f"optim/test_{name}.py",), keyword)


def case(name: str, system: str) -> Tests:
    """The shared case of an optimizer, where it compares with the test's formula."""
    return Tests((f"optim/test_{name}.py::{system}",), "formula or step", shared=True)


FAULTS = [
    Fault(
        "the second moment is updated by the wrong factor",
        "optim/core/inner.py",
        "v.mul_(beta2).addcmul_(low, low, value=1 - beta2)",
        "v.mul_(beta2).addcmul_(low, low, value=1 - beta1)",
        case("galore", "TestAdamW"),
    ),
    Fault(
        "the bias correction counts one step too few",
        "optim/core/inner.py",
        "return lr * math.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))",
        "return lr * math.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 2))",
        case("galore", "TestAdamW"),
    ),
    Fault(
        "eps stands outside of the correction everywhere",
        "optim/core/inner.py",
        'eps = self.eps if self.eps_mode == "outside" else self.eps * math.sqrt(1 - beta2 ** (step + 1))',
        "eps = self.eps",
        Tests(("optim/test_dct_adamw.py",), "vectors or full_rank or huge"),
    ),
    Fault(
        "second moments turn sign with the basis",
        "optim/core/inner.py",
        'state["exp_avg_sq"] = rotated(state["exp_avg_sq"], R, side).abs_()',
        'state["exp_avg_sq"] = rotated(state["exp_avg_sq"], R, side)',
        of("driver", "rotation"),
    ),
    Fault(
        "moments are rotated from the wrong side",
        "optim/core/inner.py",
        'return moment @ R if side == "right" else R.mT @ moment',
        'return moment @ R if side == "right" else R @ moment',
        of("driver", "rotation"),
    ),
    Fault(
        "8-bit moments are stored before they are updated",
        "optim/core/inner.py",
        "yield here, self.advance(grad[here], m, v, step)\n            for value",
        "yield here, self.advance(grad[here], m.clone(), v.clone(), step)\n            for value",
        case("galore", "Test8bit"),
    ),
    Fault(
        "16-bit second moments are rounded to the nearest",
        "optim/core/half.py",
        "v[here] = round_at_random(second, generator)",
        "v[here] = second.bfloat16()",
        of("galore_moments", "keeps_growing"),
    ),
    Fault(
        "16-bit rounding takes the same noise in every step",
        "optim/core/half.py",
        'generator = stream_on(low.device, step, "moments", *low.shape)',
        'generator = stream_on(low.device, 0, "moments", *low.shape)',
        of("galore_moments", "keeps_growing"),
    ),
    Fault(
        "Adafactor's column is a mean along the wrong axis",
        "optim/core/adafactor.py",
        'state["row"].lerp_(q.mean(-1), 1 - beta2), state["col"].lerp_(q.mean(-2), 1 - beta2)',
        'state["row"].lerp_(q.mean(-1), 1 - beta2), state["col"].lerp_(q.amax(-2), 1 - beta2)',
        case("galore", "TestAdafactor"),
    ),
    Fault(
        "the longer side is projected",
        "optim/core/projectors.py",
        'return ("right",) if (m >= n) == (self.proj_type == "std") else ("left",)',
        'return ("right",) if (m < n) == (self.proj_type == "std") else ("left",)',
        Tests(("optim/test_galore_vectors.py", "optim/test_galore_moments.py"), "vectors_adamw or share_of_adamw"),
    ),
    Fault(
        "a subspace is chosen one step late",
        "optim/core/projectors.py",
        'return (step + state.get("phase", 0)) % self.update_interval == 0 or not (\n',
        'return (step + state.get("phase", 0)) % self.update_interval == 1 or not (\n',
        Tests(("optim/test_galore_subspace.py", "optim/test_galore_vectors.py"), "refresh_happens or vectors_adamw"),
    ),
    Fault(
        "a gradient with NaN chooses a subspace",
        "optim/core/projectors.py",
        '            if "right_basis" in state or "left_basis" in state:\n                return False\n',
        '            if "right_basis" in state or "left_basis" in state:\n                return True\n',
        Tests(("optim/test_q_galore_projector.py", "optim/test_galore_subspace.py"), "bad_gradient or nan_gradient"),
    ),
    Fault(
        "where both sides are projected, weights do not decay",
        "optim/core/projectors.py",
        "sharded.add_product(weight, left.to(dtype) @ sharded.gather(low), right.to(dtype).mT, alpha=alpha, beta=beta)",
        "sharded.add_product(weight, left.to(dtype) @ sharded.gather(low), right.to(dtype).mT, alpha=alpha)",
        case("galore", "TestFull"),
    ),
    Fault(
        "weight decay after the update acts before it",
        "optim/core/driver.py",
        "size = eta if before else eta * kept",
        "size = eta",
        case("galore", "TestAdamW"),
    ),
    Fault(
        "clipping squares the factor",
        "optim/core/driver.py",
        "low=low * small)",
        "low=low * small * small)",
        of("stepping", "clipping_scales or bound"),
    ),
    Fault(
        "staggered parameters all come at once",
        "optim/core/driver.py",
        "return -(place * interval // len(projected)) % interval",
        "return 0",
        of("stepping", "stagger"),
    ),
    Fault(
        "a step of fewer micro-batches is lost",
        "optim/core/driver.py",
        'if self.state.get(p, {}).get("micro", 0):',
        'if self.state.get(p, {}).get("micro", 0) > self.accumulate:',
        of("stepping", "fewer_micro"),
    ),
    Fault(
        "rounding noise of 8-bit weights is the same in every step",
        "optim/core/driver.py",
        'return stream_on(p.device, group.get("seed", 0), "store", *self._place(p), step)',
        'return stream_on(p.device, group.get("seed", 0), "store", *self._place(p))',
        of("q_galore_8bit", "rounding or noise or stochastic"),
    ),
    Fault(
        "rounding noise of 8-bit weights is the same for every parameter",
        "optim/core/driver.py",
        'return stream_on(p.device, group.get("seed", 0), "store", *self._place(p), step)',
        'return stream_on(p.device, group.get("seed", 0), "store", step)',
        of("q_galore_8bit", "rounding or noise or stochastic"),
    ),
    Fault(
        "the fused kernel decays before where it should decay after",
        "optim/core/dense.py",
        "weight_decay=0.0 if decay_after else weight_decay,",
        "weight_decay=weight_decay,",
        of("driver", "fused or decay"),
    ),
    Fault(
        "Fira's residual takes the whole gradient",
        "optim/core/residuals.py",
        "rest = D - sharded.replicate(factor, D) * low.to(D.dtype)",
        "rest = D",
        case("fira", "TestFira"),
    ),
    Fault(
        "Fira's limiter is never applied",
        "optim/core/residuals.py",
        "c = torch.where(before > 0, c, 1.0)",
        "c = torch.ones_like(c)",
        of("fira", "vectors or written_formula"),
    ),
    Fault(
        "error feedback forgets",
        "optim/core/residuals.py",
        "return error.add_(grad)",
        "return error.mul_(0).add_(grad)",
        of("dct_adamw_residual", "loses_nothing"),
    ),
    Fault(
        "Q-GaLore's interval grows without looking at the cosine",
        "optim/q_galore.py",
        'float(state["queue"].mean()) >= self.cos_threshold',
        'float(state["queue"].mean()) >= -1.0',
        Tests(("optim/test_q_galore_projector.py", "optim/test_q_galore.py"), "interval_grows or vectors_lazy"),
    ),
    Fault(
        "Q-GaLore cares for the sign of a singular vector",
        "optim/q_galore.py",
        "cosine = (before @ now).abs() / (",
        "cosine = (before @ now) / (",
        of("q_galore_projector", "sign_of_a_vector"),
    ),
    Fault(
        "an 8-bit gradient is used twice",
        "optim/core/int8.py",
        "p.zeros, group_size=p.group_size, generator=draws)\n        p.float_grad = None",
        "p.zeros, group_size=p.group_size, generator=draws)",
        Tests(("optim/test_q_galore_8bit.py", "optim/test_int8.py"), "used_once or test_store"),
    ),
    Fault(
        "Q-GaLore waits for subspaces that agree more than the authors' do",
        "optim/q_galore.py",
        "        cos_threshold: float = 0.4,\n",
        "        cos_threshold: float = 0.9,\n",
        of("q_galore_input", "defaults_are"),
    ),
    Fault(
        "16-bit weights are rounded to the nearest",
        "optim/core/rounding.py",
        "target.copy_(source if generator is None else round_at_random(source, draws, p.dtype))",
        "target.copy_(source)",
        of("16bit", "add_up"),
    ),
    Fault(
        "a master copy undoes what others change",
        "optim/core/rounding.py",
        "torch.where(copy.to(now.dtype) == now, copy, now.to(copy.dtype))",
        "copy",
        of("16bit", "master_follows"),
    ),
    Fault(
        "a second layer-wise update within a step goes unnoticed",
        "optim/core/driver.py",
        "        self._check_first(p)\n",
        "",
        of("stepping", "second_update"),
    ),
    Fault(
        "8-bit gradients of two passes do not add up",
        "optim/core/int8.py",
        "        total.addmm_(g.mT, x)\n",
        "        total.copy_(g.mT @ x)\n",
        of("int8", "used_twice or checkpointing or share_a_weight"),
    ),
    Fault(
        "DCT-AdamW keeps the smallest scores",
        "optim/dct.py",
        "order = torch.sort(scores, descending=True, stable=True).indices",
        "order = torch.sort(scores, descending=False, stable=True).indices",
        of("dct_adamw_selection", "largest_scores or ties"),
    ),
    Fault(
        "DCT-AdamW's new columns inherit the moments of old ones",
        "optim/dct.py",
        "state[name] = state[name].index_select(dim, old).mul_(stays)",
        "state[name] = state[name].index_select(dim, old)",
        Tests(("optim/test_dct_adamw_selection.py", "optim/test_dct_adamw.py"), "follow_their_columns or vectors"),
    ),
    Fault(
        "a restart keeps the moments",
        "optim/restart.py",
        "        self.optimizer.state.clear()\n        self._forget = True\n",
        "        self._forget = False\n",
        of("restart", "state_of_all or new_optimizer"),
    ),
    Fault(
        "the cosine of a restarted run is cut at the restart",
        "optim/restart.py",
        "progress = (start - warmup_steps) / (total_steps - warmup_steps)",
        "progress = start / total_steps",
        of("restart", "official_schedule or by_hand"),
    ),
    Fault(
        "matrices that are not above the rank are projected",
        "optim/core/groups.py",
        "if min(p.shape) <= rank else",
        "if min(p.shape) < rank else",
        of("groups", "sorting or target_modules"),
    ),
]
