"""The learned weights of a LoRA for one module, and the differences that LyCORIS' algorithms make.

The algorithms are defined by Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation", and by the ``lycoris-lora`` package, whose names of tensors are
kept. Unlike LoRA, they cannot be trained on here: their difference is computed once and merged
into W.

Shapes: W is [out, in] of a linear layer, [out, in, k, k] of a convolution, [C] of a norm; r is the
rank. Each function takes a module's tensors in fp32, W in fp32 and the strength, and returns the
difference, in W's shape. Those of the low-rank family return it at strength 1, flattened to
[out, ...] or not: ``_apply_strength`` does the rest for all of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """The low-rank factors for one linear layer or convolution W: W + scale B A.

    ``down`` A [r, in] or [r, in, k, k], ``up`` B [out, r] or [out, r, 1, 1], ``magnitude`` (DoRA)
    [out]: the norm that each row of the sum is given.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    rslora: bool = False
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def kohya_alpha(self) -> float:
        """The alpha that gives the same scale as alpha / rank, which kohya's files use."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha

    def to(self, dtype: torch.dtype) -> "LoraWeights":
        """The same weights in ``dtype``."""
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        down, up = self.down.to(dtype), self.up.to(dtype)
        return replace(self, down=down, up=up, magnitude=magnitude)

    def delta(self) -> torch.Tensor:
        """scale B A in fp32, of the weight's shape."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(len(self.up), *self.down.shape[1:])

    def merged(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """W with this merged into it, in fp32: W + strength scale B A; with DoRA, each row of that
        at its magnitude (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5)."""
        adapted = weight.float() + strength * self.delta()
        if self.magnitude is None:
            return adapted
        norms = adapted.flatten(1).norm(dim=1)
        rows = (self.magnitude.float() / norms).reshape(-1, *[1] * (adapted.ndim - 1))
        merged: torch.Tensor = rows * adapted
        return merged


# The algorithms of LyCORIS, one function for each.

Tensors = Mapping[str, torch.Tensor]
Difference = Callable[["Delta", Tensors, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Delta:
    """A change that peft cannot hold, to one module: to its weight by one of ``ALGORITHMS``, to its
    bias by a difference, or to both.

    ``alpha`` is that of alpha / rank, or bounds OFT's rotations; None: the file has none.
    ``scalar`` is a learned factor of the difference, in files of early LyCORIS versions;
    ``on_input`` says what (IA)^3 scales.
    """

    algorithm: "Algorithm"
    tensors: Tensors
    alpha: float | None = None
    scalar: float = 1.0
    on_input: bool = False

    def scale(self, rank: int) -> float:
        return self.scalar * (1.0 if self.alpha is None else self.alpha / rank)

    @property
    def title(self) -> str:
        """Its name in messages: the algorithm, or the feature that a peft adapter cannot have."""
        if self.algorithm.title == "LoRA":
            return "biases" if "diff_b" in self.tensors else "DoRA normed over its input"
        return self.algorithm.title

    @property
    def has_weight(self) -> bool:
        return self.algorithm.difference is not None

    @property
    def bias(self) -> torch.Tensor | None:
        """The difference of the bias."""
        return self.tensors.get("diff_b", self.tensors.get("b_norm"))

    @property
    def num_inputs(self) -> int | None:
        """The number of input features of the module, if the tensors alone show it."""
        for name in ("down", "diff", "hada_w1_b", "b2"):
            if name in self.tensors and self.tensors[name].ndim > 1:
                return self.tensors[name].shape[1]
        return None

    def difference(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """The difference to add to ``weight``, in fp32.

        Raises:
            RuntimeError: the shapes do not fit together, or do not fit this weight.
        """
        assert self.algorithm.difference is not None
        tensors = {name: tensor.to(weight.device).float() for name, tensor in self.tensors.items()}
        return self.algorithm.difference(self, tensors, weight.float(), strength)

    def merged(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """``weight`` with the difference in it, in fp32."""
        return weight.float() + self.difference(weight, strength)

    def mismatch(self, shape: tuple[int, ...]) -> str:
        """Why this does not fit weights of ``shape``; empty if it does. No number is computed."""
        shapes = replace(self, tensors={n: t.to("meta") for n, t in self.tensors.items()})
        try:
            weight_shape = shapes.difference(torch.empty(shape, device="meta")).shape
        except (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError):
            return f"its tensors make no weights of {list(shape)}"
        return "" if weight_shape == shape else f"its tensors make weights of {list(weight_shape)}"


def lora(delta: Delta, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """alpha / r B A (Hu et al.); a convolution may have a core C [r, r, k, k] between them, the
    Tucker form: sum over m, n of B_im C_mn A_nj."""
    down, up, core = t["down"].flatten(1), t["up"].flatten(1), t.get("mid")
    product = up @ down if core is None else torch.einsum("mn...,im,nj->ij...", core, up, down)
    return delta.scale(len(down)) * product


def loha(delta: Delta, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """alpha / r (B1 A1) * (B2 A2), element by element (Hyeon-Woo et al., "FedPara"). In Tucker form
    both have a core T [r, r, k, k], and B is stored transposed."""
    products = []
    for number in "12":
        b, a = t[f"hada_w{number}_a"], t[f"hada_w{number}_b"]
        if f"hada_t{number}" in t:
            products.append(torch.einsum("mn...,mi,nj->ij...", t[f"hada_t{number}"], b, a))
        else:
            products.append(b @ a)
    return delta.scale(len(t["hada_w1_b"])) * (products[0] * products[1])


def lokr(delta: Delta, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """alpha / r W1 (x) W2, Kronecker's product, each of them whole or of two factors of rank r;
    with both whole there is no rank, and the scale is 1."""
    rank = None
    if "lokr_w1" in t:
        first = t["lokr_w1"]
    else:
        first, rank = t["lokr_w1_a"] @ t["lokr_w1_b"], len(t["lokr_w1_b"])
    if "lokr_w2" in t:
        second = t["lokr_w2"]
    else:
        b, a = t["lokr_w2_a"], t["lokr_w2_b"]
        rank = len(a)
        if "lokr_t2" in t:
            second = torch.einsum("mn...,mi,nj->ij...", t["lokr_t2"], b, a)
        else:
            second = b @ a.flatten(1)
    scale = delta.scalar if rank is None else delta.scale(rank)
    return scale * torch.kron(first, second.flatten(1))


def full_difference(delta: Delta, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """The difference itself, of a weight (``diff``) or a norm's (``w_norm``)."""
    return t["w_norm"] if "w_norm" in t else t["diff"]


def glora(delta: Delta, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """alpha / r (W A1 A2 + B1 B2) (Chavan et al., "One-for-All"). Early files have the two of each
    pair in the other order."""
    a1, a2, b1, b2 = (t[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    is_early = a1.shape != (weight.shape[1], len(a2)) or len(b1) != len(weight)
    if is_early:
        a1, a2, b1, b2 = a2, a1, b2, b1
    if "bm" in t:
        plain = torch.einsum("mn...,im,nj->ij...", t["bm"], b1, b2)
    else:
        plain = (b1 @ b2).reshape(weight.shape)
    inside = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
    return delta.scale(len(a2)) * (inside + plain)


def _apply_strength(product: Callable[[Delta, Tensors, torch.Tensor], torch.Tensor]) -> Difference:
    """The difference from a low-rank product: times the strength, or with DoRA normed by rows."""

    def difference(delta: Delta, t: Tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
        change = product(delta, t, weight)
        if len(change) != len(weight):  # another weight may have as many numbers
            raise ValueError(f"{len(change)} rows for {len(weight)}")
        change = change.reshape(weight.shape)
        if "dora_scale" in t:
            return dora_weight(weight + change, t["dora_scale"], strength) - weight
        return strength * change

    return difference


def dora_weight(
    weight: torch.Tensor, magnitude: torch.Tensor, strength: float = 1.0
) -> torch.Tensor:
    """DoRA (Liu et al.): ``weight`` with each of its rows at its norm in ``magnitude``, [out, 1,
    ...], or each of its columns at that in [1, in, ...]; the strength goes from the norms that it
    has to these."""
    ones = [1] * (weight.ndim - 2)
    if magnitude.numel() == len(weight) == len(magnitude):
        dims, shape = [1, *range(2, weight.ndim)], [-1, 1, *ones]
    elif magnitude.ndim > 1 and magnitude.shape[:2] == (1, weight.shape[1]):
        dims, shape = [0, *range(2, weight.ndim)], [1, -1, *ones]
    else:
        raise ValueError(f"norms of {list(magnitude.shape)}")
    norms = torch.linalg.vector_norm(weight, dim=dims, keepdim=True) + torch.finfo(weight.dtype).eps
    factors: torch.Tensor = strength * (magnitude.reshape(shape) / norms - 1) + 1
    return weight * factors


def ia3(delta: Delta, t: Tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """W with its inputs, or its outputs, each times 1 + w (Liu et al., "(IA)^3")."""
    axis = 1 if delta.on_input else 0
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    return strength * weight * t["weight"].reshape(shape)


def oft(delta: Delta, t: Tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """The rows of W, in blocks, rotated by R (Qiu et al., "Controlling Text-to-Image Diffusion by
    Orthogonal Finetuning"): what each block becomes is R^T of it, then times ``rescale``."""
    rotation = t["oft_diag"] if "oft_diag" in t else _rotation(delta, t["oft_blocks"], weight)
    num, size, _ = rotation.shape
    rotation = _interpolate(rotation, strength)
    blocks = weight.reshape(num, size, *weight.shape[1:])
    turned = torch.einsum("knm,kn...->km...", rotation, blocks).reshape(weight.shape)
    return _rescale_rows(t, turned) - weight


def boft(delta: Delta, t: Tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """OFT as a product of sparse rotations (Liu et al., "Parameter-Efficient Orthogonal Finetuning
    via Butterfly Factorization"): stage i mixes rows that are 2^i half blocks apart."""
    stages = _interpolate(_rotation(delta, t["boft_blocks"], weight), strength)
    size = stages.shape[-1]
    turned = weight
    for number, rotation in enumerate(stages):
        apart = 2**number * size // 2
        paired = turned.reshape(-1, 2, apart, *weight.shape[1:]).transpose(1, 2)
        blocks = paired.reshape(-1, size, *weight.shape[1:])
        blocks = torch.einsum("kij,kj...->ki...", rotation, blocks)
        turned = blocks.reshape(paired.shape).transpose(1, 2).reshape(weight.shape)
    return _rescale_rows(t, turned) - weight


def _rotation(delta: Delta, blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Cayley's (I + Q)(I - Q)^-1 of each block, Q = B - B^T; with a bound (constrained OFT) Q's
    norm over all blocks is at most alpha times the number of outputs."""
    skew = blocks - blocks.transpose(-1, -2)
    bound = (delta.alpha or 0.0) * len(weight)
    if bound > 0:
        skew = skew * (bound / (skew.norm() + 1e-8)).clamp(max=1)
    eye = torch.eye(blocks.shape[-1], device=blocks.device)
    inverse: torch.Tensor = torch.linalg.inv_ex(eye - skew).inverse  # there always is one
    return (eye + skew) @ inverse


def _interpolate(rotation: torch.Tensor, strength: float) -> torch.Tensor:
    """From the identity, at strength 0, to ``rotation``."""
    eye = torch.eye(rotation.shape[-1], device=rotation.device)
    return strength * rotation + (1 - strength) * eye


def _rescale_rows(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    if "rescale" not in t:
        return weight
    return t["rescale"].reshape(len(weight), *[1] * (weight.ndim - 1)) * weight


@dataclass(frozen=True)
class Algorithm:
    """``needs``: alternative sets of required tensors; ``takes``: optional tensors."""

    title: str
    difference: Difference | None  # None: it changes biases alone
    needs: tuple[frozenset[str], ...]
    takes: frozenset[str] = frozenset()

    def fits(self, names: frozenset[str]) -> bool:
        """Whether a module with these tensors, and no others, is of this algorithm."""
        return any(need <= names <= need | self.takes for need in self.needs)


def _algorithm(title: str, difference: Difference | None, needs: str, takes: str = "") -> Algorithm:
    """``needs``: names, with ``|`` between the alternatives."""
    every = tuple(frozenset(names.split()) for names in needs.split("|"))
    return Algorithm(title, difference, every, frozenset(takes.split()) | {"diff_b"})


_LOHA_FACTORS = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"
_LOW_RANK_EXTRAS = "alpha scalar dora_scale"
ALGORITHMS = (
    _algorithm("LoRA", _apply_strength(lora), "down up", _LOW_RANK_EXTRAS),
    _algorithm("LoCon in Tucker form", _apply_strength(lora), "down up mid", _LOW_RANK_EXTRAS),
    _algorithm(
        "LoHa",
        _apply_strength(loha),
        f"{_LOHA_FACTORS} | {_LOHA_FACTORS} hada_t1 hada_t2",
        _LOW_RANK_EXTRAS,
    ),
    _algorithm(
        "LoKr",
        _apply_strength(lokr),
        "lokr_w1 lokr_w2 | lokr_w1_a lokr_w1_b lokr_w2 | "
        "lokr_w1 lokr_w2_a lokr_w2_b | lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b | "
        "lokr_w1 lokr_w2_a lokr_w2_b lokr_t2 | lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2",
        _LOW_RANK_EXTRAS,
    ),
    _algorithm("GLoRA", _apply_strength(glora), "a1 a2 b1 b2", "bm alpha scalar"),
    _algorithm("(IA)^3", ia3, "weight on_input"),
    _algorithm("OFT", oft, "oft_blocks | oft_diag", "alpha rescale"),
    _algorithm("BOFT", boft, "boft_blocks", "alpha rescale"),  # oft_blocks of four dimensions
    _algorithm("full differences", _apply_strength(full_difference), "diff", "alpha"),
    _algorithm("norms", _apply_strength(full_difference), "w_norm | w_norm b_norm", "alpha"),
    _algorithm("biases", None, "diff_b | b_norm"),
)
NAMES = frozenset(
    name
    for algorithm in ALGORITHMS
    for need in (*algorithm.needs, algorithm.takes)
    for name in need
)


def find_algorithm(names: frozenset[str]) -> Algorithm | None:
    """The algorithm of a module with these tensors; None: of none, or tensors are missing."""
    return next((algorithm for algorithm in ALGORITHMS if algorithm.fits(names)), None)
