"""Losses that are out of the ordinary."""

from megatron.sft.training.nonfinite import SpikeWatch


def test_a_loss_far_above_the_last_ones_is_a_spike() -> None:
    watch = SpikeWatch()
    assert not any(watch.look(2.0 + 0.01 * (step % 3)) for step in range(40))
    assert watch.look(3.0).startswith("loss 3.0000 is far above the last 40 (2.0098 ±")
    assert not watch.look(2.05)
    assert not SpikeWatch().look(1e9)
