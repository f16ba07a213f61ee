"""Published unlearning methods for image classifiers.

All have one call: `method(model, splits, *, seed=0, **settings) -> model`. `model` is a classifier that the method may edit in place (the
benchmark passes a copy); it is returned in evaluation mode. `splits` has the training data `f` (forget) and `r` (remain), each with
`len`, `labels` `(n,)` int64, `loader(batch_size, seed=None)`, whose batches hold `pixel_values` and `labels`, and such a batch for a
tensor of indices: what `evaluation.kd_data.split_by_class` returns. Settings have the defaults of the method's source.
"""
