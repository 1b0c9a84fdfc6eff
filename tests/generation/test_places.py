"""Who has which pages: counted, shared, given back; a mistake here would put one sequence's tokens into another's."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from sharding.rules import Sharding
from smollm3_jax.errors import OptionError
from smollm3_jax.generation.places import Pages, pool_for
from smollm3_jax.kv_cache import KVCache, LayerCache

PAGE, WIDTH, SLOTS = 2, 4, 3


def cache(count: int) -> KVCache:
    """Of one value a token, by which a page is known."""
    values = jnp.arange(count * PAGE, dtype=jnp.float32).reshape(1, count, PAGE, 1)
    table = jnp.zeros((SLOTS, WIDTH), jnp.int32)
    return KVCache((LayerCache(values, values + 100),), jnp.zeros(SLOTS, jnp.int32), table)


def pool(count: int, kept: int = 100) -> Pages:
    return Pages(count, PAGE, SLOTS, WIDTH, kept, None)


def there(begun: tuple[KVCache, int] | None) -> int:
    assert begun is not None
    return begun[1]


def check(pages: Pages) -> None:
    """Every page is free, kept or somebody's; the table says what is held; the counts are those of what is held."""
    users = Counter(page for held in pages._held.values() for page in held)
    assert [users[page] for page in range(pages.count)] == pages._users and pages.used == len(users)
    assert sorted([*pages._free, *(users.keys() | pages.index.pages)]) == list(range(pages.count))
    for slot in range(SLOTS):
        row = pages._table[slot]
        assert row[row < pages.count].tolist() == pages._held.get(slot, [])
        assert len(set(pages._held.get(slot, []))) == len(pages._held.get(slot, []))


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=7)
EVENTS = st.lists(
    st.tuples(st.sampled_from(["begin", "grow", "copy", "release"]), st.integers(0, 2), PROMPTS), max_size=30
)


@settings(max_examples=300, deadline=None)
@given(st.integers(4, 9), st.integers(0, 9), EVENTS)
def test_pages_are_counted(count, kept, events):
    """What two slots both have was begun alike, and is never what one of them writes into next."""
    pages, prompts, one = pool(count, kept), {}, cache(count)
    for event, slot, tokens in events:
        before = {slot: list(held) for slot, held in pages._held.items()}
        if event == "begin" and slot not in prompts:
            whole = (len(tokens) - 1) // PAGE * PAGE
            begun = pages.begin(one, slot, "", tokens[:-1], len(tokens))
            if begun is None:
                assert pages._held == before and count - pages.used < WIDTH
            else:
                assert begun[1] <= whole
                prompts[slot] = tokens[:-1]
                for end in range(begun[1] + PAGE, whole + 1, PAGE):
                    pages.keep(one, slot, "", tokens[:end])
                found = pages.index.find("", tokens[:whole])
                assert len(found) == min(whole // PAGE, kept) and found == pages._held[slot][: len(found)]
        elif event == "grow" and slot in prompts:
            total = min(WIDTH * PAGE, len(prompts[slot]) + 3)
            assert pages.grow(slot, total) or (count - pages.used < WIDTH and pages._held == before)
        elif event == "copy" and slot in prompts and (target := (slot + 1) % SLOTS) not in prompts:
            copied = pages.copied(one, slot, target, len(prompts[slot]), len(prompts[slot]) + 1)
            if copied is not None:
                one, prompts[target] = copied, prompts[slot]
        elif event == "release" and slot in prompts:
            pages.release(slot)
            del prompts[slot]
        check(pages)
        for a in prompts:
            for b in prompts.keys() - {a}:
                shared = set(pages._held[a]) & set(pages._held[b])
                written = pages._held[a][len(prompts[a]) // PAGE :]
                assert not shared & set(written)
                assert len(shared) * PAGE <= min(len(prompts[a]), len(prompts[b]))
    for slot in prompts:
        pages.release(slot)
    check(pages)
    assert pages.used == 0 and len(pages._free) + len(pages.index.pages) == count


def test_the_table_goes_to_the_device():
    pages, one = pool(6), cache(6)
    assert there(pages.begin(one, 1, None, [5, 6, 7], 4)) == 0
    one = pages.placed(one)
    assert one.table is not None and one.table.tolist() == [[6] * 4, [0, 1, 6, 6], [6] * 4]
    assert pages.placed(one) is one
    pages.release(1)
    np.testing.assert_array_equal(pages.placed(one).table, 6)


def test_a_copy_shares_whole_pages_and_has_its_own_last_one():
    pages, one = pool(6), cache(6)
    pages.begin(one, 0, None, [5, 6, 7], 4)
    before = np.array(one.layers[0].k)
    copied = pages.copied(one, 0, 2, 3, 5)
    assert copied is not None and pages._held == {0: [0, 1], 2: [0, 2, 3]}
    after = np.asarray(copied.layers[0].k)
    np.testing.assert_array_equal(after[0, 2], before[0, 1])
    np.testing.assert_array_equal(np.delete(after, 2, axis=1), np.delete(before, 2, axis=1))
    assert pages.copied(copied, 0, 1, 2, 8) is None and pages.used == 4  # three more are not there


def test_what_is_kept_waits_until_it_is_wanted():
    pages, one = pool(5), cache(5)
    for start in (1, 3):
        pages.begin(one, 0, "", [start, start], 3)
        pages.keep(one, 0, "", [start, start])
        pages.release(0)
    assert pages.used == 0 and pages.index.pages == {0, 1}
    assert there(pages.begin(one, 0, "", [1, 1, 5], 4)) == 2 and pages._held[0][0] == 0
    assert there(pages.begin(one, 1, "other", [1, 1, 5], 4)) == 0  # what another salt has kept is not found
    assert pages.begin(one, 2, None, [8], 4) is None
    assert there(pages.begin(one, 2, None, [8], 2)) == 0 and pages.index.pages == {0}  # the other was nobody's
    check(pages)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 95, "context": 90}, "cache_tokens is 95; one sequence of 90 tokens takes 96, in pages of 32"),
        ({"lookup": 4}, "lookup is 4 and cache_tokens 256; drafts need rows"),
        ({"rules": "serve_tp", "shape": (2, 2)}, "these rules split slots or their tokens"),
        ({"rules": "serve_tp_long", "shape": (1, 2)}, "these rules split slots or their tokens"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    rules, shape = options.pop("rules", None), options.pop("shape", (1, 1))
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    sharding = None if rules is None else Sharding.of(Mesh(devices, ("data", "tensor")), rules)
    settings = {"tokens": 256, "page": 32, "context": 100, "lookup": 0, "sharding": sharding}
    with pytest.raises(OptionError, match=words):
        pool_for(**settings | options)


def test_a_pool_has_whole_pages():
    sharding = Sharding.of(Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "tensor")), "serve_tp")
    assert pool_for(100, 32, 96, 0, sharding) == (3, 32) and pool_for(None, 32, 96, 4, None) is None
