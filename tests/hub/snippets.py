"""Code for the processes elsewhere; `folder`, `name` and `options` are filled in by the tests."""

DRAW = """
import numpy, torch
def draw(pipe, **call):
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=3, guidance_scale=3.0, output_type="np") | call
    return pipe("a red heart", generator=torch.Generator().manual_seed(7), **call).images.tolist()
"""
PUSH = (
    DRAW
    + """
from pipelines import TextToImagePipeline
pipe = TextToImagePipeline.from_pretrained(folder)
info = pipe.push_to_hub(name, **options)
value = [draw(pipe), info.oid, info.pr_revision]
"""
)
LOAD = (
    DRAW
    + """
from pipelines import TextToImagePipeline
pipe = TextToImagePipeline.from_pretrained(name, **options)
value = draw(pipe)
assert not any(module.startswith("diffusers_modules") for module in sys.modules)
"""
)
