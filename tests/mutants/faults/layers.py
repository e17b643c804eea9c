"""Faults in layers that are trained from the start, and in the layers that families share."""

from mutants.planting import Fault, Tests


def case(name: str, system: str) -> Tests:
    """The shared case of a layer."""
    return Tests((f"layers/test_{name}.py::{system}",), "", shared=True)


def of(name: str, keyword: str = "") -> Tests:
    """Tests of one file."""
    return Tests((f"layers/test_{name}.py",), keyword)


FAULTS = [
    Fault(
        "DeltaProduct's query does not see the last step of its token",
        "linalg/delta.py",
        "unseen = token > torch",
        "unseen = token >= torch",
        case("delta_product", "TestDeltaProductAll"),
    ),
    Fault(
        "DeltaProduct's chunk hands on a state that has not decayed",
        "linalg/delta.py",
        "state = (state if factor is None else factor * state) + write.mT @ written",
        "state = state + write.mT @ written",
        case("delta_product", "TestDeltaProductAll"),
    ),
    Fault(
        "DeltaProduct's keys serve every other value head",
        "layers/delta_product/layer.py",
        "k.repeat_interleave(group, 2)",
        "k.repeat(1, 1, group, 1)",
        case("delta_product", "TestDeltaProductGroupedValues"),
    ),
    Fault(
        "DeltaProduct's masked tokens still let the state decay",
        "layers/delta_product/layer.py",
        "None if g is None else g.masked_fill(hidden, 0)",
        "g",
        Tests(("layers/test_delta_product.py",), "hole"),
    ),
    Fault(
        "DeltaProduct's convolution hands on one input too early",
        "layers/delta_product/convolution.py",
        "seen[:, seen.shape[1] - taps + 1 :]",
        "seen[:, seen.shape[1] - taps : -1]",
        case("delta_product", "TestDeltaProductAll"),
    ),
    Fault(
        "SLTrain's support does not get the gradient of its places",
        "layers/sltrain.py",
        "dvalues = full.view(-1).index_select(0, indices)",
        "dvalues = full.view(-1)[: len(indices)]",
        case("sltrain", "TestSLTrain"),
    ),
    Fault(
        "SLTrain's thin path forgets the scale",
        "layers/sltrain.py",
        "y = torch.addmm(y, rows @ A.mT, B.mT, alpha=scale)",
        "y = torch.addmm(y, rows @ A.mT, B.mT)",
        case("sltrain", "TestSLTrain"),
    ),
    Fault(
        "Monarch's output is not interleaved",
        "linalg/monarch.py",
        "y = by_class.permute(1, 2, 0).reshape(",
        "y = by_class.permute(1, 0, 2).reshape(",
        case("monarch_layer", "TestMonarchWide"),
    ),
    Fault(
        "Monarch's projection puts all of the singular value into one factor",
        "linalg/monarch.py",
        "w2[b, channel[held] // l] = root * u[a, b, :, i]",
        "w2[b, channel[held] // l] = u[a, b, :, i]",
        case("monarch_layer", "TestMonarchWide"),
    ),
    Fault(
        "Maestro's importance is not hierarchical",
        "layers/maestro/components.py",
        "return _norms(_columns(self.U), hierarchical) * _norms(_rows(self.V), hierarchical)",
        "return _norms(_columns(self.U), False) * _norms(_rows(self.V), False)",
        of("maestro", "importance"),
    ),
    Fault(
        "Maestro grows again when it should shrink",
        "layers/maestro/components.py",
        "self._rank = min(self._rank, int((self.importance() >= threshold).sum()))",
        "self._rank = int((self.importance() >= threshold).sum())",
        of("maestro", "never_grows"),
    ),
    Fault(
        "Maestro's target of the sampled pass is not a distribution",
        "layers/maestro/training.py",
        "target = logits.detach().reshape(-1, classes).to(wide).softmax(-1)",
        "target = logits.detach().reshape(-1, classes).to(wide).sigmoid()",
        of("maestro_training", "extra_loss or penalty or definition"),
    ),
    Fault(
        "Maestro draws anew for each micro-batch",
        "layers/maestro/training.py",
        "        if not self._drawn:\n            self._drawn = self.sampler.draw()\n",
        "        self._drawn = self.sampler.draw()\n",
        of("maestro_training", "micro_batches"),
    ),
    Fault(
        "Maestro never shrinks at its interval",
        "layers/maestro/training.py",
        "self.steps % self.shrink_interval == 0",
        "self.steps % self.shrink_interval == self.shrink_interval",
        of("maestro_training", "shrinks_at_the_interval or companion"),
    ),
    Fault(
        "SST's active vectors learn with their singular value",
        "layers/sst/layer.py",
        "thin.mT @ rows).to(S.dtype)",
        "(thin * S.index_select(0, active)).mT @ rows).to(S.dtype)",
        Tests(("layers/test_sst.py", "layers/test_sst_gradients.py"), "small_singular or vectors_at"),
    ),
    Fault(
        "SST's negative singular values stay",
        "layers/sst/layer.py",
        "self.S.clamp_(min=0)",
        "self.S.clamp_(min=-1e9)",
        Tests(("layers/test_sst_factors.py", "layers/test_sst_scheduler.py"), "post_step or clips"),
    ),
    Fault(
        "SST draws without regard to the singular values",
        "layers/sst/layer.py",
        "return 0.5 * (uniform + torch.where(total > 0, S / total, uniform))",
        "return uniform",
        of("sst", "probabilities"),
    ),
    Fault(
        "SST's warm-up lasts one step less",
        "layers/sst/schedule.py",
        "step = self.steps % self.steps_per_iteration + 1",
        "step = self.steps % self.steps_per_iteration + 2",
        of("sst_scheduler", "warm_up"),
    ),
    Fault(
        "SST drops the state of every parameter",
        "layers/sst/schedule.py",
        "for parameter in (layer.U_active, layer.Vh_active):",
        "for parameter in (layer.U_active, layer.Vh_active, layer.S):",
        of("sst_scheduler", "drops_the_state"),
    ),
    Fault(
        "the hyperboloid has another radius",
        "layers/sst/lorentz.py",
        "((time.square() - 1) / length).sqrt()",
        "(time.square() / length).sqrt()",
        of("lorentz", "formula or hyperboloid"),
    ),
    Fault(
        "a low-rank layer's scale is alpha",
        "modules/low_rank.py",
        "return 1.0 if self.alpha is None else self.alpha / self.rank",
        "return 1.0 if self.alpha is None else self.alpha",
        Tests(("test_modules.py::TestLowRankScaled",), "", shared=True),
    ),
]
