"""What can be trained: the VAE, the transformer (with a text encoder of its own or a given one), a LoRA."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..defaults import EDIT, TEXT_TOKENS
from ..files.checkpoints import TOKENIZER, TRANSFORMER, load_autoencoder, load_transformer
from ..files.convert import ARCHITECTURES
from ..files.safe_write import make_folder, write_bytes, write_json
from ..files.tensor_files import write_tensors
from ..model.config import AutoencoderConfig, TransformerConfig
from ..model.transformer import Transformer
from ..pictures.images import save_image
from ..runtime.fp8 import LINEARS
from ..runtime.layers import Operations
from ..runtime.session import sample
from ..sampling.checks import patch_size
from ..sampling.settings import SamplingSettings
from ..shapeedit.edits import draw_sample
from ..shapeedit.evaluate import reconstruct
from ..shapeedit.metrics import psnr
from ..shapeedit.photographs import photographs
from ..shapeedit.render import render
from ..text.encoder import TextEncoder, load_text_encoder, load_tokenizer
from ..text.t5 import T5Encoder
from ..tokenizer.quantizer import encode, latent_grids, to_tokens
from ..tokenizer.schedule import TOKEN_PIXELS, Schedule, schedule_for
from ..tokenizer.vae import Autoencoder, ResidualBlock
from .eight_bit_base import freeze
from .lora import add_lora, lora_state, save_lora
from .objective import bit_accuracy, bit_loss, draw_flips, teach, token_weights, tokenizer_loss
from .pairs import first_pairs, pair_batches, picture_batches
from .parallel import BlockCausal, TeacherForced, parallel_logits
from .settings import SHAPEEDIT, NewTokenizer, NewTransformer, Reconstruction, Stage
from .shapes import PairBlocks, scene_batches
from .sharded import whole
from .words import make_vocabulary, new_text_encoder, pad

logger = logging.getLogger(__name__)

SHOWN = 8
TOKENIZER_FILE, TRANSFORMER_FILE, LORA_FILE = "tokenizer.safetensors", "transformer.safetensors", "lora.safetensors"
TEXT_FOLDER = "text_encoder"
TEXT_STEP = 8


class TokenizerModel(nn.Module):
    """The autoencoder with its loss, so that wrappers of a module see one forward."""

    def __init__(self, autoencoder: Autoencoder, schedule: Schedule, weights: Reconstruction) -> None:
        super().__init__()
        self.autoencoder, self.schedule, self.weights = autoencoder, schedule, weights

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return tokenizer_loss(
            self.autoencoder, pixels, self.schedule, TOKEN_PIXELS // self.autoencoder.config.stride, self.weights
        )


class TokenizerTask:
    """Train the VAE on ShapeEdit's scenes and cluttered pictures, or on a user's pictures."""

    def __init__(self, stage: Stage, accelerator) -> None:
        self.stage, self.accelerator = stage, accelerator
        self.schedule = schedule_for(stage.data.size)
        if stage.autoencoder:
            self.autoencoder = load_autoencoder(stage.autoencoder).train().requires_grad_(True)
        else:
            self.autoencoder = new_autoencoder(stage.new_tokenizer or NewTokenizer(), stage.seed)
        self.autoencoder.to(accelerator.device, memory_format=torch.channels_last)
        self.model = TokenizerModel(self.autoencoder, self.schedule, stage.reconstruction)
        if stage.compile:
            _compile(m for m in self.autoencoder.modules() if isinstance(m, ResidualBlock))

    def batches(self, start: int) -> Iterator[Tensor]:
        stage, process = self.stage, self.accelerator
        if stage.data.source != SHAPEEDIT:
            yield from picture_batches(stage, start, process)
        first = start * stage.optimisation.accumulate
        yield from scene_batches(stage.data, stage.seed, stage.batch, first, process.process_index, process.device)

    def loss(self, model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, squared = model(batch.contiguous(memory_format=torch.channels_last))
        return loss, {"psnr": 10 * torch.log10(4 / squared)}

    @torch.no_grad()
    def look(self, folder: Path, step: int) -> dict[str, float]:
        figures, rows = {}, []
        for name, pixels in self._shown().items():
            with torch.compiler.set_stance("force_eager"):
                restored = torch.cat([reconstruct(self.autoencoder, x, self.schedule) for x in pixels.split(8)])
            figures[f"psnr_{name}"] = round(float(psnr(restored, pixels).mean()), 3)
            rows += [pixels[:SHOWN], restored[:SHOWN]]
        save_grid(folder / f"{step:07d}.png", rows)
        return figures

    def _shown(self) -> dict[str, Tensor]:
        """Pictures to look at: of the user's, or scenes and photographs that training never sees."""
        device = self.accelerator.device
        if self.stage.data.source != SHAPEEDIT:
            return {"pictures": first_pairs(self.stage, SHOWN)[1].to(device)}
        rng = Random(1)
        shown = {"scenes": render([draw_sample(rng, "test").target for _ in range(4 * SHOWN)], device)}
        pictures = photographs()
        return shown if pictures is None else shown | {"photographs": pictures.to(device)}

    def export(self, folder: Path) -> list[Path]:
        path = folder / TOKENIZER_FILE
        _save(path, self.autoencoder.state_dict(), TOKENIZER, self.accelerator)
        return [path]


class Exact:
    """A batch that wrappers of a module hand on as it is: FSDP rounds the numbers in tensors and dictionaries, and the
    signs of the target's features are what is learned."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch


class EditModel(nn.Module):
    """Transformer and, where it is trained too, text encoder, with the loss of a batch of encoded pairs."""

    def __init__(
        self, transformer: Transformer, text: nn.Module | None, store: TeacherForced, patch: int, stage: Stage
    ):
        super().__init__()
        self.transformer, self.text, self.store = transformer, text, store
        self.schedule, self.patch, self.settings = store.schedule, patch, stage.objective
        self.teach = torch.compile(teach, dynamic=False) if stage.compile else teach

    def forward(self, given: Exact, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = given.batch
        device, settings, count = batch["source"].device, self.settings, len(batch["source"])
        draw = torch.rand(2, count, generator=generator, device=device)
        flips = draw_flips(batch["target"].shape, self.schedule, self.patch, draw[0] * settings.flips, generator)
        taught = self.teach(batch["target"], self.schedule, self.patch, flips)
        texts = self._texts(batch, draw[1] < settings.text_dropout)
        source = batch["source"].float()
        if settings.sums:
            summed = torch.rand(count, 1, 1, 1, generator=generator, device=device) < settings.sums
            source = torch.where(summed, encode(source, latent_grids(self.schedule, self.patch))[1], source)
        source = to_tokens(source, self.patch)
        logits = parallel_logits(self.transformer, source, taught.inputs, texts, self.store, real=batch["real"])
        weights = token_weights(self.schedule, batch.get("region"), settings.inside, settings.power)
        loss, scales = bit_loss(logits, taught.labels, weights)
        right, right_by_scale = bit_accuracy(logits, taught.labels)
        return loss, {"bits": scales, "bit_accuracy": right, "bit_accuracy_by_scale": right_by_scale}

    def _texts(self, batch: dict[str, Tensor], dropped: Tensor) -> Tensor:
        if self.text is None:
            features = batch["features"]
        else:
            features = self.text(batch["ids"], batch["real"])
        learned = self.transformer.unconditional(features.shape[1], features.device)
        return torch.where(dropped[:, None, None], learned, features.float())


class TransformerTask:
    """Train a transformer (task "transformer") or adapters in it (task "lora") on pairs."""

    def __init__(self, stage: Stage, accelerator) -> None:
        self.stage, self.accelerator = stage, accelerator
        self.schedule = schedule_for(stage.data.size)
        device = accelerator.device
        self.autoencoder = load_autoencoder(stage.autoencoder, device=device)
        kind = torch.bfloat16 if stage.precision == "bf16" and device.type == "cuda" else torch.float32
        self.encoder = copy.deepcopy(self.autoencoder.encoder).to(kind, memory_format=torch.channels_last)
        self.tokenise, self.text = self._text_encoder()
        self.transformer = self._transformer().to(device)
        self.patch = patch_size(self.transformer.config, self.autoencoder.config)
        if stage.task == "lora":
            add_lora(self.transformer, stage.lora.rank, stage.lora.alpha, stage.lora.targets)
        if stage.checkpointing:
            for block in self.transformer.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        trained = self.text if stage.train_text or stage.new_text else None
        if trained is not None:
            trained.train().requires_grad_(True)
        self.model = EditModel(self.transformer, trained, self._store(), self.patch, stage)
        # Every process has read what is frozen: nothing of it is sent, nor has NCCL types for all of it.
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)
        if stage.compile:
            torch._dynamo.config.allow_unspec_int_on_nn_module = True
            _compile(self.transformer.blocks)

    def _store(self) -> TeacherForced:
        stage, device, size = self.stage, self.accelerator.device, self.transformer.config.head_size
        # FlexAttention has no backward pass on the CPU, needs heads of 16 and compiled code, and was not tried with
        # recomputation or sharded weights.
        sharded = self.accelerator.distributed_type == "FSDP"
        fused = stage.compile and device.type == "cuda" and size >= 16 and not stage.checkpointing and not sharded
        return (BlockCausal if fused else TeacherForced)(self.schedule, size, device)

    def _text_encoder(self):
        stage, device = self.stage, self.accelerator.device
        if stage.new_text:
            from tokenizers import Tokenizer

            path = self._vocabulary()
            tokenise = load_tokenizer(path)
            torch.manual_seed(stage.seed)
            text = new_text_encoder(stage.new_text, Tokenizer.from_file(str(path)).get_vocab_size())
            self.vocabulary = path
            return tokenise, text.to(device)
        self.vocabulary = Path(stage.text_encoder)
        # Beside a base in 8 bits the text encoder is as editing holds it.
        half = stage.task == "lora" and stage.lora.base != LINEARS[0] and device.type == "cuda"
        encoder = load_text_encoder(stage.text_encoder, dtype=torch.float16 if half else torch.float32, device=device)
        return encoder.ids, encoder.model

    def _vocabulary(self) -> Path:
        path = Path(self.accelerator.project_dir) / TEXT_FOLDER / "tokenizer.json"
        if self.accelerator.is_main_process and not path.exists():
            make_vocabulary(path, self.stage.new_text.vocabulary)
        self.accelerator.wait_for_everyone()
        return path

    def _transformer(self) -> Transformer:
        stage, device = self.stage, self.accelerator.device
        if stage.transformer:
            lora = stage.task == "lora"
            kind = torch.bfloat16 if lora and stage.precision == "bf16" else torch.float32
            linears = stage.lora.base if lora else LINEARS[0]
            # An Infinity checkpoint may be where a transformer begins to learn to edit.
            network = load_transformer(stage.transformer, dtype=kind, device=device, linears=linears, kind=EDIT).train()
            if linears != LINEARS[0]:
                freeze(network, kind)
            return network.requires_grad_(not lora)
        width = self.text.config.width
        length = stage.new_text.length if stage.new_text else TEXT_TOKENS
        sizes = stage.new_transformer or NewTransformer()
        return new_transformer(sizes, self.autoencoder.config, width, length, stage.seed)

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        stage, process = self.stage, self.accelerator
        if stage.data.source != SHAPEEDIT:
            yield from pair_batches(self, start)
        place = process.process_index, process.num_processes, process.device
        blocks = PairBlocks(stage.data, stage.seed, stage.batch, *place, self.encode, self.padded)
        for batch in blocks.batches(start * stage.optimisation.accumulate):
            yield self.with_features(batch)

    def encode(self, pixels: Tensor) -> Tensor:
        """Features of pixels [B, 3, y, x], in the training's precision."""
        kind = next(self.encoder.parameters()).dtype
        with torch.no_grad():
            return self.encoder(pixels.to(kind, memory_format=torch.channels_last)).float()

    def padded(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids of instructions and which are real, padded to a multiple of 8."""
        ids = [self.tokenise(text) for text in instructions]
        return pad(ids, TEXT_STEP * math.ceil(max(map(len, ids)) / TEXT_STEP))

    @torch.no_grad()
    def with_features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with its text's features, where the text encoder is not trained."""
        if self.model.text is not None:
            return batch
        return batch | {"features": self.text(batch["ids"], batch["real"]).float()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], generator) -> tuple[Tensor, dict[str, Tensor]]:
        return model(Exact(batch), generator)

    @torch.no_grad()
    def look(self, folder: Path, step: int) -> dict[str, float]:
        device = self.accelerator.device
        source, target, instructions = self._shown()
        source, target = source.to(device), target.to(device)
        encoder = TextEncoder(self.text.eval(), self.tokenise, device)
        features = torch.cat([self.autoencoder.encode(x[None]) for x in source])
        texts = encoder.encode(instructions)
        settings = SamplingSettings(temperature=0.0)
        # Blocks compiled for the training's one shape would be compiled anew for every scale.
        with torch.compiler.set_stance("force_eager"):
            *_, scale = sample(self.transformer.eval(), features, texts, self.schedule, settings)
        edited = self.autoencoder.decode(scale.running_sum)
        save_grid(folder / f"{step:07d}.png", [source[:SHOWN], edited[:SHOWN], target[:SHOWN]])
        self.transformer.train()
        if self.model.text is not None:
            self.text.train()
        error = (edited - target).square().mean((1, 2, 3))
        before = (source - target).square().mean((1, 2, 3))
        local = before > 1e-6
        return {"edited_half_way": round(float((error[local] < 0.5 * before[local]).float().mean()), 3)}

    def _shown(self) -> tuple[Tensor, Tensor, list[str]]:
        """Pairs to look at: the user's first, or held-out ones."""
        if self.stage.data.source != SHAPEEDIT:
            return first_pairs(self.stage, SHOWN)
        rng, wanted = Random(2), self.stage.data.styles
        style = max(wanted, key=wanted.get) if wanted else ""
        samples = [draw_sample(rng, "test", "style" if style else None, style=style) for _ in range(4 * SHOWN)]
        return (
            render([s.source for s in samples]),
            render([s.target for s in samples]),
            [s.instruction for s in samples],
        )

    def export(self, folder: Path) -> list[Path]:
        if self.stage.task == "lora":
            state = {key: t.bfloat16() if t.ndim else t for key, t in lora_state(self.transformer).items()}
            if self.accelerator.is_main_process:
                save_lora(folder / LORA_FILE, state, {"varedit.stage": self.stage.name}, overwrite=True)
            return [folder / LORA_FILE]
        written = [folder / TRANSFORMER_FILE]
        _save(written[0], self.transformer.state_dict(), TRANSFORMER, self.accelerator)
        if self.model.text is not None:
            written.append(folder / TEXT_FOLDER)
            save_text(written[1], self.text, self.vocabulary, self.accelerator.is_main_process)
        return written


TASKS = {"tokenizer": TokenizerTask, "transformer": TransformerTask, "lora": TransformerTask}


def new_autoencoder(sizes: NewTokenizer, seed: int) -> Autoencoder:
    """An autoencoder with torch's own random weights."""
    torch.manual_seed(seed)
    config = AutoencoderConfig(
        sizes.bits,
        sizes.encoder_widths[0],
        tuple(sizes.encoder_widths),
        tuple(sizes.decoder_widths),
        sizes.encoder_blocks,
        sizes.decoder_blocks,
        sizes.stride,
    )
    return Autoencoder(config, Operations)


def new_transformer(
    sizes: NewTransformer, autoencoder: AutoencoderConfig, text_width: int, text_length: int, seed: int
) -> Transformer:
    """A transformer with random weights: small output projections and modulation, so that blocks start as nearly
    nothing; gates open half; a query scale of 4."""
    torch.manual_seed(seed)
    bits = autoencoder.bits * (TOKEN_PIXELS // autoencoder.stride) ** 2
    config = TransformerConfig(
        sizes.depth, sizes.width, sizes.heads, bits, text_width, text_length, sizes.hidden, sizes.levels
    )
    network = Transformer(config, Operations)
    for name, parameter in network.named_parameters():
        if name.endswith("scale_mul.weight"):
            nn.init.constant_(parameter, math.log(4))
        elif name.endswith("ada_gss.weight"):
            nn.init.normal_(parameter, std=0.01)
            nn.init.constant_(parameter.data[:2], 0.5)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name:
            nn.init.ones_(parameter)
        else:
            small = ("proj.weight", "fc2.weight", "ada_lin.1.weight")
            nn.init.normal_(parameter, std=0.01 if name.endswith(small) else 0.02)
    return network


def save_grid(path: Path, rows: Sequence[Tensor]) -> None:
    """Rows of pictures [n, 3, y, x] in [-1, 1] as one PNG."""
    width = max(len(row) for row in rows)
    lines = []
    for row in rows:
        cells = torch.cat(list(row), dim=2)
        lines.append(nn.functional.pad(cells, (0, width * row.shape[-1] - cells.shape[2]), value=1.0))
    whole = ((torch.cat(lines, dim=1).float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    save_image(Image.fromarray(whole.permute(1, 2, 0).numpy()), path, overwrite=True)


def _compile(modules) -> None:
    """Compile repeated modules one by one: they share their code, so the first ones' costs are nearly all."""
    # Two kinds of block for every length of text, and once more for a last, smaller batch.
    torch._dynamo.config.recompile_limit = 4 * TEXT_TOKENS // TEXT_STEP
    torch._dynamo.config.optimize_ddp = False  # it splits graphs that span a network, not those of one block
    for module in modules:
        module.compile(dynamic=False)


def _save(path: Path, state: dict[str, Tensor], part: str, accelerator) -> None:
    rounded = _rounded(state, accelerator.is_main_process)
    if rounded:
        make_folder(path.parent)
        metadata = {"format": "pt", "varedit.architecture": ARCHITECTURES[part], "varedit.precision": "bf16"}
        write_tensors(path, rounded, metadata)


def _rounded(state: dict[str, Tensor], kept: bool) -> dict[str, Tensor]:
    """A state as files hold it. All processes must ask (see `whole`); kept: whether this one keeps what it gets."""
    parts = ((key, whole(tensor)) for key, tensor in state.items())
    return {key: part.to("cpu", torch.bfloat16).contiguous() for key, part in parts if kept}


def save_text(folder: Path, text: T5Encoder, vocabulary: Path, write: bool = True) -> None:
    """Write a T5 encoder as a Hugging Face folder, with the tokenizer file that lies at or beside `vocabulary`.

    write: False in all but one of several processes, which then only hand over their parts (see `whole`).
    """
    state = _rounded(text.state_dict(), write)
    if not write:
        return
    make_folder(folder)
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    write_json(folder / "config.json", text.config.to_json(), indent=2)
    beside = vocabulary if vocabulary.is_dir() else vocabulary.parent
    for file in (beside / "tokenizer.json", beside / "spiece.model"):
        if file.is_file() and file.parent != folder:
            write_bytes(folder / file.name, file.read_bytes())
