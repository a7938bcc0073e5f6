import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitft_jax import quantizer
from vitft_jax.errors import InputError
from vitft_jax.ptq import ranges
from vitft_jax.ptq.observe import Seen

ROWS = jax.random.normal(jax.random.key(0), (2000, 32))
SEEN = Seen(jnp.max(jnp.abs(ROWS), axis=0), ROWS)


def test_the_hundredth_percentile_is_the_largest_value():
    assert ranges.bound_of(SEEN, "100") == ranges.bound_of(SEEN, "max") == jnp.abs(ROWS).max()


def test_a_percentile_holds_that_share_of_the_values():
    inside = jnp.mean(jnp.abs(ROWS) <= ranges.bound_of(SEEN, "99.9"))
    assert float(inside) == pytest.approx(0.999, abs=1e-4)


def test_the_least_error_is_no_worse_than_any_percentile_and_leaves_a_lone_outlier_out():
    planted = ROWS.at[0, 0].set(60.0)
    seen = Seen(jnp.max(jnp.abs(planted), axis=0), planted)
    error = lambda bound: float(jnp.sum((quantizer.fake(planted, bound) - planted) ** 2))  # noqa: E731
    best = error(ranges.bound_of(seen, "mse"))
    for p in ranges.PERCENTILES:
        assert best <= error(ranges.percentile(seen, p))
    near = jnp.full((2000, 32), 1.0).at[0, 0].set(1.5)
    assert ranges.bound_of(Seen(near.max(0), near), "mse") <= 1.5


def test_a_static_range_equals_the_dynamic_one_when_all_tokens_are_alike():
    rows = jnp.tile(ROWS[:1], (5, 1))
    kernel = quantizer.quantise_kernel(jax.random.normal(jax.random.key(1), (32, 4)))
    bound = ranges.bound_of(Seen(jnp.abs(rows).max(0), rows), "max")
    np.testing.assert_array_equal(quantizer.frozen_product(rows, kernel, bound), quantizer.frozen_product(rows, kernel))


@pytest.mark.parametrize("how", ["median", "0", "101"])
def test_bad_ranges(how):
    with pytest.raises(InputError, match=f"--static {how}: "):
        ranges.bound_of(SEEN, how)
