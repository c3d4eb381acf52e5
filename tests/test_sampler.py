"""Order: every item as often as asked, whatever the buckets, batches and ranks."""

from collections import Counter

from diffusion_trainer.utils.buckets import Bucket
from diffusion_trainer.utils.dataset import Sample
from diffusion_trainer.utils.index import Media
from diffusion_trainer.utils.media import Properties, Source
from diffusion_trainer.utils.position import Position
from diffusion_trainer.utils.sampler import Sampler
from hypothesis import given
from hypothesis import strategies as st


def sample(number: int, bucket: Bucket, repeats: float) -> Sample:
    return Sample(Media(Source(f"{number}.png"), str(number), Properties(64, 64)), bucket, num_repeats=repeats)


BUCKETS = [Bucket(64, 64), Bucket(96, 48), Bucket(64, 64, 17)]
samples = st.lists(
    st.tuples(st.sampled_from(BUCKETS), st.sampled_from([1, 2, 3, 0.5, 1.25, 0.3])), min_size=1, max_size=40
).map(lambda entries: [sample(n, *entry) for n, entry in enumerate(entries)])


@given(samples, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**40), st.integers(0, 5))
def test_every_item_exactly_so_often_in_batches_of_one_bucket(items, micro, accumulated, ranks, seed, epoch):
    sizes = {bucket: (micro + n) * accumulated * ranks for n, bucket in enumerate(BUCKETS)}
    sampler = Sampler(items, sizes.__getitem__, seed)
    plan = sampler.epoch(epoch)
    assert len(plan) == sampler.num_steps(epoch)
    assert plan == Sampler(items, sizes.__getitem__, seed).epoch(epoch)
    seen: Counter[int] = Counter()
    for step in plan:
        (bucket,) = {items[draw.sample].bucket for draw in step}
        assert len(step) == sizes[bucket]
        assert abs(sum(draw.weight for draw in step) - len(step)) < 1e-6
        for rank in range(ranks):  # together the ranks see the whole step
            share = len(step) // ranks
            seen.update(d.sample for d in step[rank * share : (rank + 1) * share] if d.weight)
    for number, item in enumerate(items):
        if item.num_repeats == int(item.num_repeats):
            assert seen[number] == item.num_repeats
        else:
            assert abs(seen[number] - item.num_repeats) < 1


@given(samples, st.integers(1, 12))
def test_fractions_are_met_over_epochs_and_totals_add_up(items, batch):
    sampler = Sampler(items, batch, 0)
    seen: Counter[int] = Counter()
    for epoch in range(20):
        seen.update(draw.sample for step in sampler.epoch(epoch) for draw in step if draw.weight)
    assert all(abs(seen[n] - 20 * item.num_repeats) < 1 for n, item in enumerate(items))
    assert sampler.total_steps(20) == sum(len(sampler.epoch(epoch)) for epoch in range(20))


def test_epochs_differ():
    items = [sample(n, BUCKETS[0], 1) for n in range(32)]
    sampler = Sampler(items, 4, 0)
    assert sampler.epoch(0) != sampler.epoch(1)


@given(samples, st.integers(1, 9), st.integers(0, 3), st.data())
def test_resuming_continues_the_plan(items, batch, epoch, data):
    plan = Sampler(items, batch, 3).epoch(epoch)
    cut = data.draw(st.integers(0, len(plan)))
    assert plan[:cut] + Sampler(items, batch, 3).epoch(epoch)[cut:] == plan


@given(
    samples,
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), max_size=3),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_an_epoch_cut_otherwise_on_the_way_still_has_every_item(items, parts, batch, epoch):
    past, seen = [], Counter[tuple[int, int]]()
    for size, num_steps in parts:
        sampler = Sampler(items, size, 5)
        plan = sampler.epoch(epoch, past)
        taken = min(num_steps, len(plan))
        seen.update((d.sample, d.repeat) for step in plan[:taken] for d in step if d.weight)
        if taken:
            past.append((sampler.batch_sizes(), taken))
    sampler = Sampler(items, batch, 5)
    rest = sampler.epoch(epoch, past)
    seen.update((d.sample, d.repeat) for step in rest for d in step if d.weight)
    whole = Counter((d.sample, d.repeat) for step in sampler.epoch(epoch) for d in step if d.weight)
    assert seen == whole
    steps_done = sum(taken for _, taken in past)
    position = Position(step=100 + steps_done, epoch=epoch, past=past)
    assert sampler.total_from(position, epoch + 3) == 100 + steps_done + len(rest) + len(
        sampler.epoch(epoch + 1)
    ) + len(sampler.epoch(epoch + 2))
    assert sampler.total_from(position, epoch) == position.step
