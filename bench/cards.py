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
    multiprocessors: of the card
    clock: Hz, at which the rates are
    """

    name: str
    bandwidth: float
    tensor: float
    fp32: float
    architecture: int | None
    source: str
    multiprocessors: int = 0
    clock: float = 0.0

    def arithmetic(self, dtype: str) -> float:
        """FLOP/s for activations of ``dtype``: fp16, bf16 or fp32."""
        return self.fp32 if dtype == "fp32" else self.tensor


# Data sheets: NVIDIA Ampere GA102 white paper (RTX 3080 10 GB, 3090), Ada white paper (RTX 4090),
# A100, H100 and H200 data sheets (SXM). Rates at boost clock; the clock of the last two follows
# from the rate, with 4096 FLOP a cycle and multiprocessor.
CARDS = {
    card.name: card
    for card in (
        Card("RTX 3080", 760e9, 59.5e12, 29.8e12, 86, "data sheet", 68, 1.71e9),
        Card("RTX 3090", 936e9, 71e12, 35.6e12, 86, "data sheet", 82, 1.695e9),
        Card("RTX 4090", 1008e9, 165.2e12, 82.6e12, 89, "data sheet", 128, 2.52e9),
        Card("A100", 2039e9, 312e12, 19.5e12, 80, "data sheet", 108, 1.41e9),
        Card("H100", 3350e9, 989.4e12, 66.9e12, 90, "data sheet", 132, 1.83e9),
        Card("H200", 4800e9, 989.4e12, 66.9e12, 90, "data sheet", 132, 1.83e9),
    )
}
