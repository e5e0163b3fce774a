"The sampler: what every batch, pass and epoch must hold, whatever the sizes."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dainv.sampling import ViewSampler

sizes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 40)).map(
    lambda s: dict(views=s[0], batch_size=s[0] * s[1], n_images=s[1] + s[2])
)


@given(sizes, st.integers(0, 3), st.integers(0, 50))
def test_a_batch_holds_distinct_images_in_every_view_once(size, seed, step):
    sampler = ViewSampler(**size, seed=seed)
    batch = sampler[step]
    assert len(batch.images.unique()) == sampler.images_per_batch
    pairs = set(zip(batch.images.tolist(), batch.views.tolist(), strict=True))
    assert pairs == {(i, v) for i in batch.images.unique().tolist() for v in range(size["views"])}
    by_group = {g: batch.images[batch.groups == g].unique().tolist() for g in range(sampler.images_per_batch)}
    assert all(len(images) == 1 for images in by_group.values())
    assert batch.passes.unique().tolist() == [step // (size["n_images"] // sampler.images_per_batch)]


@given(sizes, st.integers(0, 3), st.integers(0, 4))
def test_a_pass_shows_no_image_twice(size, seed, number):
    sampler = ViewSampler(**size, seed=seed)
    steps = size["n_images"] // sampler.images_per_batch
    seen = torch.cat([sampler[number * steps + s].images.unique() for s in range(steps)])
    assert len(seen.unique()) == len(seen) == steps * sampler.images_per_batch


@given(sizes, st.integers(0, 3), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_step_does_not_depend_on_what_was_asked_before(size, seed, steps):
    wandering = ViewSampler(**size, seed=seed)
    for step in steps:
        batch, fresh = wandering[step], ViewSampler(**size, seed=seed)[step]
        assert all(torch.equal(getattr(batch, f), getattr(fresh, f)) for f in ("images", "views", "groups", "passes"))


def test_the_order_changes_with_the_seed_and_the_pass():
    a, b = ViewSampler(1000, 128, 8, seed=0), ViewSampler(1000, 128, 8, seed=1)
    assert not torch.equal(a[0].images, b[0].images)
    assert not torch.equal(a[0].images, a[1000 // 16].images)


def test_views_of_an_image_do_not_lie_together():
    groups = ViewSampler(50_000, 128, 8)[0].groups
    assert (groups[1:] == groups[:-1]).float().mean() < 0.25


@pytest.mark.parametrize(
    ("true_epochs", "views", "steps"), [(False, 8, 391), (True, 8, 3125), (False, 1, 391), (True, 1, 391)]
)
def test_the_length_of_an_epoch(true_epochs, views, steps):
    assert ViewSampler(50_000, 128, views, true_epochs=true_epochs).steps_per_epoch == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((100, 10, 3), "batch_size=10"), ((100, 10, 0), "views=0"), ((100, 0, 1), "batch_size=0"), ((3, 8, 2), "only 3")],
)
def test_impossible_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViewSampler(*arguments)


@given(
    counts=st.lists(st.integers(8, 30), min_size=2, max_size=5),
    images=st.integers(1, 12),
    views=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_balanced_batches_hold_every_class_equally_often_and_a_class_goes_through_its_images(
    counts, images, views, seed
):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    sampler = ViewSampler(len(labels), images * views, views, seed, labels=labels)
    shown, seen = torch.zeros(len(labels), dtype=torch.long), []
    for step in range(2 * len(labels) // images + 1):
        batch = sampler[step]
        per_class = labels[batch.images].bincount(minlength=len(counts)) // views
        assert per_class.max() - per_class.min() <= 1 + (images % len(counts) > 0)
        first = batch.views == 0
        shown += batch.images[first].bincount(minlength=len(labels))
        seen += list(zip(batch.images[first].tolist(), batch.passes[first].tolist(), strict=True))
    assert len(set(seen)) == len(seen)  # an image comes once in a pass
    for c in range(len(counts)):
        assert shown[labels == c].max() - shown[labels == c].min() <= 1


def test_balanced_batches_refuse():
    with pytest.raises(ValueError, match="two classes or more"):
        ViewSampler(10, 4, 2, labels=torch.zeros(10, dtype=torch.long))
    with pytest.raises(ValueError, match="class 1 has 1 images"):
        ViewSampler(10, 4, 2, labels=torch.tensor([0] * 9 + [1]))
    with pytest.raises(ValueError, match="one class per image"):
        ViewSampler(10, 4, 2, labels=torch.arange(8) % 2)
