"""How far mergekit's fp32 result may lie from ours, entry by entry, by what its arithmetic can lose.

Both start from the same bfloat16 weights, work in fp32 and round once to bfloat16, so results one bfloat16 step apart
are equal (a boundary may lie between them). Where base and update nearly cancel, that step is finer
than fp32 itself; there an entry may be off by the sum of these, u = 2^-24, x_i the operands (task vectors, or weights
where the method works on those):

* **Roundings of the entry's own arithmetic**: `ROUNDINGS` u (|base| + sum_i |x_i|). A subtraction and a product per
  model, two additions, a division, the factor lambda and the base: 11 operations, each off by at most u times a number
  that the bracket bounds, in either program.
* **Statistics** (norms and inner products over the N entries of a tensor; our sums are exact, mergekit's fp32).
  Added one after the other, n terms of one sign have a relative error of standard deviation u sqrt(n)/3 (roundings
  independent, std u/sqrt(3), of partial sums that grow to the whole). Torch adds in vectors of at least `LANES` floats,
  so n = N / 8; three deviations are u sqrt(N / 8). A cosine takes an inner product and the roots of two square sums:
  twice that. Coefficients follow a cosine with a slope of at most 3 in model_stock (t = 3 cos / (1 + 2 cos), which
  multiplies the mean, a third of the sum) and below 1 in the spherical means, which use at most two such numbers
  (angle and length): `COSINES` = 4 times u sqrt(N / 8) sum_i |x_i|. Seen so far: half of it (multislerp).
* **SCE's weights** w_i = E_i / sum E over what is kept. Which of several tied entries are kept is arbitrary in
  mergekit (topk) and by index here. Were all tied entries swapped, no E_i changes by more than the energy of the tied
  entries; a quotient of two such sums changes by no more than twice the largest share of it in the kept energy.
"""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-24
ROUNDINGS = 2 * 11  # in both programs
COSINES = 4
LANES = 8
WITH_STATISTICS = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce"}
ON_WEIGHTS = {"linear", "slerp", "nuslerp", "karcher", "passthrough"}


def allowance(method: str, on_base: bool, base: Tensor, tuned: list[Tensor], unclear: Tensor) -> Tensor:
    """The bound above for each entry of one tensor; ``unclear`` marks the tied ones. Float64, the tensor's shape."""
    weights = torch.stack([t.double() for t in tuned])
    deltas = weights - base.double()
    of_weights = method in ON_WEIGHTS and not (method == "nuslerp" and on_base)
    size = weights.abs().sum(0) + base.double().abs() if of_weights else deltas.abs().sum(0)
    own = ROUNDINGS * U * (base.double().abs() + weights.abs().sum(0))
    statistics = COSINES * U * (base.numel() / LANES) ** 0.5 if method in WITH_STATISTICS else 0.0
    if method == "sce" and unclear.any():
        variance = deltas.var(dim=0, unbiased=False)
        energy = deltas.square()
        tied, certain = (energy[:, m].sum(1) for m in (unclear, variance > variance[unclear].max()))
        statistics += 2 * float((tied / (tied + certain).clamp(min=1e-300)).max())
    return own + statistics * size
