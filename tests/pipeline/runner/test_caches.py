"""Which cache is taken, and that none is taken twice."""

from pipeline.runner.caches import Caches
from tests.pipeline.runner.stale_model import StaleModel


def test_a_cache_is_taken_again_where_it_fits_and_is_not_far_too_large():
    model = StaleModel()
    caches = Caches(model)
    first = caches.take(4, 64)
    assert caches.take(4, 64) is not first
    caches.give_back(first)
    assert caches.take(3, 48) is first
    caches.give_back(first)
    for batch, slots in ((5, 64), (4, 80), (4, 16)):
        other = caches.take(batch, slots)
        assert other is not first
        assert (other.batch, other.slots) == (batch, slots)
        caches.give_back(first)
    assert len(model.allocated) == 5


def test_the_smallest_that_fits_is_taken():
    caches = Caches(StaleModel())
    for slots in (96, 64, 80):
        caches.give_back(caches.session.allocate(2, slots))
    assert [caches.take(2, 64).slots for _ in range(3)] == [64, 80, 96]


def test_idle_caches_go_before_a_new_one_comes():
    caches = Caches(StaleModel())
    caches.give_back(caches.session.allocate(2, 64))
    caches.take(2, 80)
    assert caches.idle == []
