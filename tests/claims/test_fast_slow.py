import numpy as np
import torch

from palimpsest.claims import fast_slow


def test_one_seed_at_a_small_scale():
    measured = fast_slow.measure(0, scale=0.02)
    control = fast_slow.measure(0, mechanism=False, scale=0.02)
    assert set(measured) == set(control)
    for name in ("unchanged", "full", "truncated", "frozen", "truncated_rare"):
        assert control[name] == measured[name]  # the baselines know nothing of the mechanism
    assert control["synthetic"] == control["truncated"]
    assert all(np.isfinite(value) for value in measured.values())
    assert 0 < measured["activation_share"] < 1


def test_no_picture_is_in_two_parts():
    pools = fast_slow._pools(3)
    assert [pool.way for pool in pools] == list(fast_slow.PARTS)
    means = [pool.x.reshape(pool.way, fast_slow.EACH, -1).mean(1) for pool in pools[1:]]
    nearest = torch.cdist(*(torch.from_numpy(mean) for mean in means[::2])).min()
    assert nearest > 0.1
    again = fast_slow._pools.__wrapped__(3)
    np.testing.assert_array_equal(again[3].x, pools[3].x)


def test_what_autograd_keeps_is_counted_and_let_go():
    x = torch.ones(100, requires_grad=True)

    def once():
        torch.autograd.grad(x.square().sum(), x)

    def chain():
        torch.autograd.grad(x.sin().sin().sin().sum(), x)

    one = fast_slow.most_kept(once)
    assert one == 400
    assert fast_slow.most_kept(lambda: [once() for _ in range(5)]) == one
    assert fast_slow.most_kept(chain) == 3 * one
