import json

import pytest

from more_hf_bench.script import best_settings, grid, points_of, search


def test_a_grid_is_every_combination():
    assert grid(a=[1, 2], b=3, c=[4, 5]) == [{"a": a, "b": 3, "c": c} for a in (1, 2) for c in (4, 5)]


def test_a_point_is_measured_once(tmp_path):
    points = points_of({"uce": grid(lamb=[1.0, 2.0]), "more": [{}]})
    asked = []

    def measure(missing):
        for point in missing:
            asked.append(point["settings"])
            if point["method"] == "more" and len(asked) == 3:
                raise KeyboardInterrupt
            yield {"score": 10 * point["settings"].get("lamb", 0)}

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "grid.csv", points, measure)
    lines = search(tmp_path / "grid.csv", points, measure)
    assert asked == [{"lamb": 1.0}, {"lamb": 2.0}, {}, {}]  # only what was stopped is asked again
    assert [json.loads(line["settings"]) for line in lines] == [point["settings"] for point in points]
    assert search(tmp_path / "grid.csv", points, lambda missing: pytest.fail("again")) == lines


def test_the_best_of_a_finished_grid():
    grids = {"more": [{}], "uce": grid(lamb=[1.0, 2.0, 3.0]), "cure": grid(alpha=[1.0, 2.0])}
    scores = {"more": [9], "uce": [5, 7, 6], "cure": [1, 2]}
    lines = [
        {"method": method, "settings": json.dumps(settings), "score": str(score)}
        for method, cells in grids.items()
        for settings, score in zip(cells, scores[method], strict=True)
    ]
    # of `more` there is nothing to choose, and cure is not finished
    assert best_settings(lines[:-1], grids, "score") == {"uce": {"lamb": 2.0}}
    assert best_settings(lines, grids, "score")["cure"] == {"alpha": 2.0}
