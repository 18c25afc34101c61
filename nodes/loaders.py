"""The three loaders: transformer, text encoder, VAE."""

from __future__ import annotations

from ..varedit_core.defaults import KINDS, PRECISIONS, PUBLISHED_VAES
from ._api import io
from .files import check, find, fingerprint, listed
from .widgets import chosen


class VAREditModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditModelLoader",
            display_name="VAREdit Model Loader",
            category="VAREdit/loaders",
            description="Loads a VAREdit transformer: published, converted, quantised, or the demo model; or one of "
            "Infinity.",
            search_aliases=[
                "load varedit",
                "unet loader",
                "diffusion model",
                "transformer",
                "checkpoint",
                "load infinity",
            ],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=listed("diffusion_models"),
                    tooltip="A transformer in ComfyUI's folder diffusion_models: 8B-1024, 8B-512, or 2B-512, which is "
                    "the smallest and fastest. varedit_demo is a toy that comes with the pack.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PRECISIONS[0],
                    tooltip="What the blocks compute in: auto is bf16 where the hardware has it, else fp32.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=KINDS[0],
                    optional=True,
                    tooltip="What the file was trained for: auto is as it says itself (by metadata, or a name that "
                    "begins with infinity_), else edit.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="For VAREdit Sampler; stock LoRA loaders fit in between."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, precision: str, kind: str = KINDS[0]):
        return fingerprint("diffusion_models", model_name)

    @classmethod
    def validate_inputs(cls, model_name: str | None):
        return check("diffusion_models", model_name)

    @classmethod
    def execute(cls, model_name: str, precision: str, kind: str = KINDS[0]) -> io.NodeOutput:
        from .adapters.model import load_model

        path = find("diffusion_models", model_name)
        return io.NodeOutput(load_model(path, chosen("precision", precision, PRECISIONS), kind=kind))


class VAREditTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditTextEncoderLoader",
            display_name="VAREdit Text Encoder Loader",
            category="VAREdit/loaders",
            description="Loads the T5 encoder a VAREdit transformer was trained with: flan-t5-xl for the published "
            "ones.",
            search_aliases=["clip loader", "flan t5 xl", "load t5", "text encoder"],
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=listed("text_encoders"),
                    tooltip=(
                        "A T5 encoder in ComfyUI's folder text_encoders: flan-t5-xl for 8B and 2B; of one in several "
                        "files, choose any. varedit_demo_t5 belongs to the demo model."
                    ),
                )
            ],
            outputs=[
                io.Clip.Output(
                    "clip", display_name="clip", tooltip="For VAREdit Text Encode or the stock CLIPTextEncode."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder_name: str | None):
        return fingerprint("text_encoders", text_encoder_name)

    @classmethod
    def validate_inputs(cls, text_encoder_name: str | None):
        return check("text_encoders", text_encoder_name)

    @classmethod
    def execute(cls, text_encoder_name: str) -> io.NodeOutput:
        from .adapters.text_encoder import load_clip

        return io.NodeOutput(load_clip(find("text_encoders", text_encoder_name)))


class VAREditVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAREditVAELoader",
            display_name="VAREdit VAE Loader",
            category="VAREdit/loaders",
            description="Loads the VAE of a VAREdit transformer.",
            search_aliases=["vae loader", "tokenizer", "infinity vae", "bsq"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=listed("vae"),
                    tooltip=f"A VAE in ComfyUI's folder vae: {PUBLISHED_VAES['8B']} for 8B, {PUBLISHED_VAES['2B']} "
                    "for 2B. varedit_demo_tokenizer belongs to the demo model.",
                )
            ],
            outputs=[
                io.Vae.Output(
                    "vae",
                    display_name="vae",
                    tooltip="For VAREdit Source Encode and Decode; the stock VAE nodes take it too.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str | None):
        return fingerprint("vae", vae_name)

    @classmethod
    def validate_inputs(cls, vae_name: str | None):
        return check("vae", vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        from .adapters.vae import load_vae

        return io.NodeOutput(load_vae(find("vae", vae_name)))
