"""Editing: change an image, or steer a sample, with a model that was not trained for it.

In reading order:

    sdedit.py               noise an image, and denoise it with another caption
    regional.py             several captions, each with its region
    ddim_inversion.py       the noise from which DDIM generates a given image
    prompt_to_prompt.py     change a caption, and keep the layout by keeping the attention
    attend_and_excite.py    move x_t until each named ingredient is attended to

All are functions around denoisers, so that they compose with samplers and guidance. The folder
needs the folders diffusion/ and networks/.
"""

from .attend_and_excite import attend_and_excite, measure_attention
from .ddim_inversion import ddim_inversion
from .prompt_to_prompt import align_characters, find_tokens, prompt_to_prompt
from .regional import regional
from .sdedit import sdedit

__all__ = [
    "align_characters",
    "attend_and_excite",
    "ddim_inversion",
    "find_tokens",
    "measure_attention",
    "prompt_to_prompt",
    "regional",
    "sdedit",
]
