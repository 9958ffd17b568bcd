"""How long the steps of a run take on GPUs, and what that costs: a range, because the speed has not been measured."""

# Shares of the peak. moshi-finetune's README reports 12,000 tokens/s on an H100. With 9 tokens and 47 GFLOP a frame, as
# this plan counts for example/moshi_7B.yaml, that is 6 %. The other is what fine-tuning of text models reaches.
REPORTED, GOOD = 0.06, 0.35


def describe_hours(flops: float, gpus: int, peak_tflops: float, price: float | None) -> list[str]:
    """Return lines: the hours of all steps at two speeds, and what they cost.

    Args:
        flops: of all steps, on each GPU.
        peak_tflops: of one GPU.
        price: of one GPU for an hour; None: no cost is shown.
    """
    good, reported = (flops / (peak_tflops * 1e12 * share) / 3600 for share in (GOOD, REPORTED))
    lines = [
        f"hours of all steps: {good:.1f} at {GOOD:.0%} of {peak_tflops:g} TFLOP/s per GPU; {reported:.1f} at "
        f"{REPORTED:.0%}, the speed that moshi-finetune reports",
        "    (not measured; for windows of full length, without evaluations and checkpoints)",
    ]
    if price is not None:
        low, high = (hours * gpus * price for hours in (good, reported))
        lines.insert(1, f"cost at {price:g} per GPU and hour: {low:,.2f} to {high:,.2f}")
    return lines
