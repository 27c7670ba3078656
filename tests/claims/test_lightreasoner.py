import numpy as np
import pytest

from palimpsest.claims import lightreasoner


@pytest.mark.filterwarnings("ignore:.*would select:UserWarning")  # models of this size have learned little
def test_one_seed_at_a_small_scale():
    measured = lightreasoner.measure(0, scale=0.07)
    control = lightreasoner.measure(0, mechanism=False, scale=0.07)
    assert set(lightreasoner.measure.names) <= set(control) < set(measured)
    assert all(np.isfinite(value) for value in (*measured.values(), *control.values()))
    assert control["expert"] == measured["expert"]  # the control changes the amateur only
    assert control["full_twin"] == measured["full_twin"] == control["full"]
    assert measured["tokens_share"] > 0


def test_models_differ_in_size_and_habit():
    world = lightreasoner.World(1, 0.01)
    expert, amateur, twin = (world.model(name) for name in ("expert", "amateur", "twin"))
    assert expert.num_parameters == twin.num_parameters > 2 * amateur.num_parameters
    assert expert.sha256 != twin.sha256
    assert expert.tokenizer.get_vocab() == amateur.tokenizer.get_vocab()
    assert len(expert.encode([("123+456=", "9750")]).ids[0]) == 1 + 8 + 4 + 1  # every sign is a token
