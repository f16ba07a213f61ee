"""Published unlearning methods for image classifiers, ours, and the references that a table needs.

Every method is a function `method(model, splits, *, seed=0, **settings)` that returns a model:

- model: a copy of its own, which it may edit. It is returned in evaluation mode.
- splits: `more_hf_bench.splits.Splits`, of which it reads `f` (D_f, what is forgotten) and `r` (D_r), and
  perhaps `classes`, the numbers of the forgotten classes.
- seed: of everything random; no global random state is touched.
- settings: the source's, with its defaults. Of `target`, a remaining class, the default is the first.
- `IncompatibleBaseError` if a weight is not finite at the end, `MoreError` for a setting or a target that
  does not exist, and what `erase_classes` raises.

A method's own docstring has its source, what is its own, and its settings. What many are told alike is one
dataclass: `training.Training` of those that train, `ours.Erasing` of ours. `training.taking` makes settings
of its fields.
"""
