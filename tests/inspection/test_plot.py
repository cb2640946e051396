"""The picture of a gradient by lag: what is drawn is what was measured and fitted."""

import io
import itertools
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from harness import ROOT, run_python

from jaxbptt import ByLag, fit_decay, plot_by_lag

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

LAGS = np.arange(24)


def geometric(rate, size=1.0, reach=24):
    """Norms that fall by a rate after a start that is not on the line, zero from `reach` on."""
    return jnp.asarray(np.where(reach > LAGS, size * rate**LAGS * (1 + 3 * (LAGS == 0)), 0))


ONE = ByLag(
    {"w": geometric(0.8, 2), "b": geometric(0.8)}, geometric(0.75), {"w": 9 + LAGS, "b": 9 + LAGS}
)
ONE = ONE._replace(partial={"w": jnp.full(24, 9.0), "b": jnp.full(24, 9.0)})
PARTS = ONE._replace(
    carry={"fast": geometric(0.5, reach=5), "slow": (geometric(0.95), jnp.zeros(24))}
)


def axes(**options):
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure.subplots()


def labelled(ax):
    """Each line that has a label, by the label's first word or two."""
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    return {line.get_label().split("  ")[0]: line for line in lines}


def saved(ax):
    kept = io.BytesIO()
    ax.figure.savefig(kept)
    return kept.getvalue()


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ---------------------------------------------------------------- what is drawn


def test_the_lines_are_the_norms():
    lines = labelled(plot_by_lag(PARTS, share=None))
    assert set(lines) == {"carry['fast']", "carry['slow'][0]", "parameters"}
    fast = np.asarray(PARTS.carry["fast"])
    np.testing.assert_array_equal(lines["carry['fast']"].get_xdata(), LAGS)
    np.testing.assert_array_equal(
        lines["carry['fast']"].get_ydata(), np.where(fast > 0, fast, np.nan)
    )
    np.testing.assert_array_equal(lines["carry['slow'][0]"].get_ydata(), PARTS.carry["slow"][0])
    both = np.hypot(ONE.params["w"], ONE.params["b"])
    np.testing.assert_allclose(lines["parameters"].get_ydata(), both, rtol=1e-12)


def test_the_labels_carry_the_rates():
    lags = ONE._replace(carry=[geometric(0.75), geometric(0.998), jnp.asarray(1.02**LAGS)])
    ax = plot_by_lag(lags, names=["a", "b", "c"], share=None)
    want = {
        "a  0.75 per step",
        "b  0.9980 per step",
        "c  1.020 per step",
        "parameters  0.80 per step",
    }
    assert {line.get_label() for line in labelled(ax).values()} == want
    assert legend_of(ax) == [line.get_label() for line in labelled(ax).values()]


def test_a_single_part_is_lambda_and_no_rate_is_said_where_there_is_none():
    ax = plot_by_lag(ONE._replace(carry={"h": geometric(1, reach=1)}), share=None)
    assert set(labelled(ax)) == {"λ", "parameters"}
    assert labelled(ax)["λ"].get_label() == "λ"


def test_the_dashes_are_the_fit_from_the_burn_in_on():
    for burn_in, first in ((None, 12), (3, 3), (22, 22)):
        ax = plot_by_lag(ONE, burn_in=burn_in, params=None, share=None)
        (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        np.testing.assert_array_equal(dashed.get_xdata(), LAGS[first:])
        np.testing.assert_allclose(dashed.get_ydata(), 0.75 ** LAGS[first:], rtol=1e-9)
    ax = plot_by_lag(PARTS, params=None, share=None)
    fast, slow = [line for line in ax.lines if line.get_linestyle() == "--"]
    np.testing.assert_array_equal(fast.get_xdata(), [2, 3, 4])
    np.testing.assert_array_equal(slow.get_xdata(), LAGS[12:])


@pytest.mark.parametrize(("share", "percent"), [(0.95, "95 %"), (0.5, "50 %"), (0.999, "99.9 %")])
def test_the_upright_line_is_behind_the_last_lag_of_the_window(share, percent):
    window = int(fit_decay(ONE).window_for(share))
    assert window <= 24 or share == 0.999
    ax = plot_by_lag(ONE, share=share)
    upright = [line for line in ax.lines if len(line.get_xdata()) == 2]
    if window <= 24:
        (line,) = upright
        assert list(line.get_xdata()) == [window - 0.5] * 2
        assert f"{percent} within {window} steps" in legend_of(ax)
    else:
        assert not upright
        assert f"{percent} within {window} steps, by the fit" in legend_of(ax)


def test_there_is_no_upright_line_where_no_window_is_long_enough():
    growing = ONE._replace(params={"w": jnp.asarray(1.1**LAGS), "b": geometric(0.5)})
    ax = plot_by_lag(growing)
    assert "no window has 95 %" in legend_of(ax)
    assert not [line for line in ax.lines if len(line.get_xdata()) == 2]
    nothing = ByLag({"w": jnp.zeros(24)}, jnp.zeros(24), {"w": jnp.zeros(24)})
    ax = plot_by_lag(nothing)
    assert legend_of(ax) == ["can't tell what window has 95 %"]
    assert not any(len(line.get_xdata()) for line in ax.lines)
    assert saved(ax)
    assert "no window has 100 %" in legend_of(plot_by_lag(ONE, share=1))


def test_what_has_diverged_is_left_out():
    lost, high = jnp.full(24, jnp.nan), jnp.asarray(10.0**LAGS).at[20:].set(jnp.inf)
    ax = plot_by_lag(ONE._replace(carry=[lost, high], params={"w": lost}), share=None)
    (line,) = labelled(ax).values()
    np.testing.assert_array_equal(line.get_ydata(), np.where(LAGS < 20, 10.0**LAGS, np.nan))
    assert "10.00 per step" in line.get_label()
    assert saved(ax)


def test_one_step_is_one_step():
    lags = ByLag({"w": jnp.zeros(24).at[0].set(1.0)}, geometric(0.9), {"w": jnp.ones(24)})
    assert "95 % within 1 step" in legend_of(plot_by_lag(lags))


def test_parameters_together_one_by_one_or_not_at_all():
    assert set(labelled(plot_by_lag(ONE, share=None, params=None))) == {"λ"}
    lines = labelled(plot_by_lag(ONE, share=None, params="each"))
    assert set(lines) == {"λ", "params['w']", "params['b']"}
    np.testing.assert_array_equal(lines["params['b']"].get_ydata(), ONE.params["b"])
    assert lines["params['b']"].get_linestyle() != lines["params['w']"].get_linestyle()
    still = ONE._replace(params=ONE.params | {"count": jnp.zeros(24, jnp.float32)})
    assert set(labelled(plot_by_lag(still, share=None, params="each"))) == set(lines)


def test_names_in_the_structure_of_the_carry():
    ax = plot_by_lag(PARTS, names={"fast": "quick", "slow": ("late", "count")}, share=None)
    assert set(labelled(ax)) == {"quick", "late", "parameters"}


# ---------------------------------------------------------------- where


def test_draws_where_it_is_told_to_and_names_all_in_a_legend():
    ax = axes(figsize=(4, 3))
    assert plot_by_lag(ONE, ax=ax) is ax
    assert ax.get_yscale() == "log"
    assert legend_of(ax) == [
        "λ  0.75 per step",
        "parameters  0.80 per step",
        "95 % within 12 steps",
    ]
    ax.figure.draw_without_rendering()
    assert ax.bbox.contains(*ax.get_legend().get_window_extent().p0)
    beyond = axes()
    plot_by_lag(ONE, ax=beyond, share=0.9999)
    assert legend_of(beyond)[-1].startswith("99.99 % within ")
    assert legend_of(beyond)[-1].endswith(" steps, by the fit")


def test_a_second_gradient_beside_the_first_has_colours_of_its_own():
    ax = plot_by_lag(PARTS, ax=axes(), names=["a", "b", "-"], params=None)
    shorter = [ONE.carry[:10], {k: v[:10] for k, v in ONE.params.items()}]
    plot_by_lag(ByLag(shorter[1], shorter[0], shorter[1]), ax=ax, names=["c"], params=None)
    colours = [to_hex(labelled(ax)[name].get_markeredgecolor()) for name in "abc"]
    assert len(set(colours)) == 3
    assert ax.get_xlim() == (-0.5, 23.5)


def in_layers(count, name="hidden"):
    """Norms of a carry whose paths are long."""
    layers = [{name: geometric(0.75, 1 + i)} for i in range(count)]
    return ONE._replace(carry={"encoder": {"layers": layers}})


@pytest.mark.parametrize(
    "lags",
    [ONE, PARTS, in_layers(8), in_layers(2, "the_state_of_the_cell_by_a_very_long_name")],
    ids=["one", "parts", "many", "long names"],
)
def test_the_legend_is_above_the_axes_and_all_of_it_in_the_figure(lags):
    ax = plot_by_lag(lags)
    ax.figure.draw_without_rendering()
    legend = ax.get_legend()
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
    box = legend.get_window_extent()
    assert ax.bbox.y1 <= box.y0 < box.y1 <= ax.figure.bbox.y1
    assert 0 <= box.x0 < box.x1 <= ax.figure.bbox.x1
    assert ax.bbox.height > 1.2 * ax.figure.dpi  # inches: room enough for the lines
    assert len(boxes) == len(labelled(ax))


def test_many_parts_can_be_told_apart():
    ax = plot_by_lag(in_layers(8))
    looks = {(line.get_markeredgecolor(), line.get_marker()) for line in labelled(ax).values()}
    assert len(looks) == 10


def test_without_a_legend_the_labels_are_there_for_a_later_one():
    ax = plot_by_lag(PARTS, legend=False)
    assert ax.get_legend() is None
    ax.legend()
    assert legend_of(ax) == legend_of(plot_by_lag(PARTS))


def test_a_long_window_has_dots_and_no_band():
    norms = jnp.asarray(0.99 ** np.arange(500))
    (line,) = labelled(plot_by_lag(ByLag(norms, norms, norms), params=None, share=None)).values()
    assert line.get_markevery() == 10
    assert len(line.get_xdata()) == 500


def test_a_figure_of_its_own_is_as_wide_as_a_column_and_can_be_saved(tmp_path):
    ax = plot_by_lag(ONE)
    width, height = ax.figure.get_size_inches()
    assert 3 <= width <= 3.6
    assert 1.8 <= height <= width
    assert saved(ax)[:8] == b"\x89PNG\r\n\x1a\n"
    ax.figure.savefig(tmp_path / "by_lag.pdf")
    assert (tmp_path / "by_lag.pdf").stat().st_size > 5000


@pytest.mark.exhaustive
def test_without_a_display_and_without_pyplot(tmp_path):
    code = (
        "import sys, jax.numpy as jnp, jaxbptt\n"
        "norms = 0.5 ** jnp.arange(9.0)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "ax = jaxbptt.plot_by_lag(jaxbptt.ByLag(norms, norms, norms))\n"
        f"ax.figure.savefig({str(tmp_path / 'out.png')!r})\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    away = dict.fromkeys(("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"))
    got = run_python("-c", code, cwd=ROOT, **away)
    assert got.returncode == 0, got.stderr
    assert got.stdout == "False\n"


# ---------------------------------------------------------------- faults


def test_matplotlib_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wanted = r"^plot_by_lag needs matplotlib.*pip install 'jaxbptt\[plot\]'$"
    with pytest.raises(ImportError, match=wanted):
        plot_by_lag(ONE)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match=r"^names must be one string for each of the 3 leaves"):
        plot_by_lag(PARTS, names=["one", "two"])
    with pytest.raises(ValueError, match=r"^params must be 'all' or 'each', but got 'some'"):
        plot_by_lag(ONE, params="some")
    with pytest.raises(ValueError, match=r"^share must be above 0 and at most 1, but got 95"):
        plot_by_lag(ONE, share=95)
    with pytest.raises(ValueError, match=r"^burn_in must be an int from 0 to 22"):
        plot_by_lag(ONE, burn_in=23)
    with pytest.raises(ValueError, match=r"Leave out full=True"):
        plot_by_lag(ONE._replace(params={"w": jnp.ones((24, 3))}))
