"""Find the erasure that suits a model, by its own pictures, and save what it leaves.

python examples/tune.py
"""

import more_hf


pipe = more_hf.load_emoji_sd()  # or any pipeline; a name is enough then: more_hf.tune(pipe, "Van Gogh")
settings = {"sampling": {"num_inference_steps": 6, "guidance_scale": 4.0}, "pictures": 16, "folder": "tuned"}
study = more_hf.tune(pipe, "High Contrast", candidates=["Fluent", "Noto", "Streamline"], **settings)
print(study)  # the edits to choose from; tuned/sheet.webp shows them
pipe = study.erase(pipe)  # the recommended one; study.erase(pipe, 2) for the second
more_hf.save(pipe, "tuned/without_high_contrast")
