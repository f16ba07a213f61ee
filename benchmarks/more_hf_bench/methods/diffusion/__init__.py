"""Published methods for text-to-image pipelines, ours, and the controls that a table needs.

Every method is a function `method(pipe, concepts, *, remap_to, retain, **settings)` that returns a pipeline:

- pipe, concepts, remap_to, retain: as in `erase_concept`. Without `remap_to`, a method that needs something
  for the concepts to become takes what its source does. Of several targets, a closed form takes the mean of
  their features. A method of one forgotten name takes several in the way that its docstring says.
- settings: those of the source, with its defaults; every random choice has the setting `seed`, and no global
  random state is touched.
- what is returned: `pipe`, edited in place and at the end; or, from a method that acts while the pipeline
  runs, a new pipeline over the same components, which are not modified.
- `PrototypeError`, `SiteNotFoundError`: as `erase_concept` raises them, the latter also for a pipeline that
  the method is not defined for; `MoreError` for a setting that does not exist; `IncompatibleBaseError` for a
  result that is not finite. The pipeline is unchanged then.

A method's own docstring has its source, what is its own, and its settings.
"""
