"""The estimate beside the gradient's own product, on a tiny model: what float32 makes of a small and of a large eps."""

from qzo.bench import eps
from tests.support import tiny


def test_the_estimate_is_the_product_of_gradient_and_direction_where_eps_fits(tmp_path, monkeypatch):
    tiny.stands_for_the_demos(tmp_path, monkeypatch, eps.demo)
    monkeypatch.setattr(eps, "EPS", (1e-6, 1e-2, 0.5))
    rows = {(row["noise"], row["activations"], row["eps"]): row for row in eps.measure(3)}
    assert len(rows) == 3 * 3 * 3
    for law in eps.VERSIONS:
        rounding, fits, curve = (rows[law, "float32", size]["error"] for size in eps.EPS)
        assert fits < 0.01 < min(rounding, curve)
        assert rows[law, "float32", 1e-2]["cosine"] > 0.9999
        coarse, fine = (rows[law, activations, 1e-2]["error"] for activations in ("bfloat16", "float16"))
        assert coarse > 2 * fine > 2 * fits
        rounding, fits, curve = (rows[law, "float32", size]["one_sided"]["error"] for size in eps.EPS)
        assert fits < 0.1 < min(rounding, curve)
