"""What a card can move and compute at best: by its data sheet, or as measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Limits of one card.

    name: as ``torch.cuda.get_device_name`` contains it
    bandwidth: bytes/s between memory and multiprocessors
    tensor: FLOP/s of the tensor cores, fp16 or bf16 in, fp32 accumulated, without sparsity
    fp32: FLOP/s of ordinary float32 arithmetic
    architecture: compute capability, 86 for 8.6
    source: where the limits are from
    """

    name: str
    bandwidth: float
    tensor: float
    fp32: float
    architecture: int | None
    source: str

    def arithmetic(self, dtype: str) -> float:
        """FLOP/s for activations of ``dtype``: fp16, bf16 or fp32."""
        return self.fp32 if dtype == "fp32" else self.tensor


# Data sheets: NVIDIA Ampere GA102 white paper (RTX 3080 10 GB, 3090), Ada white paper (RTX 4090),
# A100 and H100 data sheets (SXM, 80 GB). Rates at boost clock.
CARDS = {
    card.name: card
    for card in (
        Card("RTX 3080", 760e9, 59.5e12, 29.8e12, 86, "data sheet"),
        Card("RTX 3090", 936e9, 71e12, 35.6e12, 86, "data sheet"),
        Card("RTX 4090", 1008e9, 165.2e12, 82.6e12, 89, "data sheet"),
        Card("A100", 2039e9, 312e12, 19.5e12, 80, "data sheet"),
        Card("H100", 3350e9, 989.4e12, 66.9e12, 90, "data sheet"),
    )
}
