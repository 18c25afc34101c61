"""The plain defaults: sizes, fits, fills, previews, the published files' names. It loads no torch.

Those of a draw are in `sampling.settings`, those of a control in its own file in `controls`.
"""

SIZES = {"256": "0.06M", "512": "0.25M", "768": "0.60M", "1024": "1M"}
"""Side of a square picture in pixels -> its named size (see `schedule.AREAS`)."""
MOST_SCALES = 13
"""Scales of the largest size."""
SIDE = "512"
SIZE = SIZES[SIDE]
FIT = "square"
"""How a picture is brought to the model's shape: one of `fitting.FITS`."""
TEXT_TOKENS = 512
NEGATIVE_PROMPT = ""
PRECISIONS = ("auto", "bf16", "fp32")
"""What a ComfyUI node lets the transformer's blocks compute in."""
EDIT, TEXT_TO_IMAGE = "edit", "text-to-image"
KINDS = ("auto", EDIT, TEXT_TO_IMAGE)
"""What a transformer was trained for, which its tensors do not tell: auto asks the file (see
`checkpoints.told_kind`)."""
PUBLISHED_TRANSFORMERS = ("8B-1024.pth", "8B-512.pth", "2B-512.pth")
PUBLISHED_VAES = {"8B": "infinity_vae_d56_f8_14_patchify.pth", "2B": "infinity_vae_d32reg.pth"}
"""Size of a published transformer -> its VAE."""
PUBLISHED_BITS = {14: "8B", 56: "8B", 32: "2B"}
"""Bits of a latent position or of a token -> the size of the published models that have so many."""
RATIOS = {
    "1:1": 1.0, "4:5": 1.25, "3:4": 1.333, "2:3": 1.5, "4:7": 1.75, "1:2": 2.0, "2:5": 2.5, "1:3": 3.0,
    "5:4": 0.8, "4:3": 0.75, "3:2": 0.666, "7:4": 0.571, "2:1": 0.5, "5:2": 0.4, "3:1": 0.333,
}  # fmt: skip
"""Width to height of a picture made of text alone -> its scale table (see `schedule.TABLES`)."""
RATIO = "1:1"
PREVIEWS = ("auto", "fast", "decoded", "off")
"""Live previews of the sampler node: by ComfyUI's setting, by a colour map, by the decoder, none."""
CROP_MARGIN = 0.25
"""What a crop shows around a mask, on every side, as a share of the mask's longer side."""
LEAST_MARGIN = 32
"""The same in pixels, at least."""
FEATHER = 0
"""Pixels inside a mask's edge over which a stitched edit appears."""
MOST_FEATHER = 4096
"""Pixels of it, at most: what it takes grows with them."""
MOST_VARIATIONS = 4096
"""Results of one edit, at most: as many as a file of tokens holds."""
FILLS = ("blur", "mirror", "white")
"""What a model sees where a picture was extended: its edges' colours, itself, or what published code pads with."""
FILL = "blur"
OVERLAP = 16
"""Pixels of an extended picture, beside what is new, that an edit may repaint."""
LENGTHS = ("pixels", "percent")
"""What an extension is counted in."""
SCALE_PICTURES = ("full", "own", "fast")
"""Pictures of scales: decoded at the final size, decoded at the scale's own, by a colour map."""
