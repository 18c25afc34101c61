"""Whole edits: sizes, alpha, batches, cancelling, and what does not fit together."""

import pytest
import torch
from PIL import Image
from support import GOLDEN, ROOT

from varedit_core import Editor, SamplingSettings
from varedit_core.cli.decode import decode
from varedit_core.controls.registry import Shortcuts
from varedit_core.defaults import PUBLISHED_VAES
from varedit_core.demo import demo_files
from varedit_core.files.weights import open_weights
from varedit_core.runtime.session import Session

CAT = ROOT / "samples" / "cat.jpg"


@pytest.fixture(scope="module")
def editor():
    path = GOLDEN / "patchify_256.safetensors"
    return Editor.load(path, path, device="cpu")


@pytest.fixture(scope="module")
def text():
    return open_weights(GOLDEN / "patchify_256.safetensors")["in.text.0"]


@pytest.mark.parametrize("method", ["square", "aspect"])
@pytest.mark.parametrize("size", [(451, 300), (1, 1), (33, 190)])
def test_the_result_has_the_inputs_size(editor, text, method, size):
    picture = Image.open(CAT).resize(size)
    (result,) = editor.edit(picture, [text], size="0.06M", method=method)
    assert result.size == size and result.mode == "RGB"


def test_alpha_is_kept(editor, text):
    picture = Image.open(CAT).convert("RGBA")
    alpha = Image.linear_gradient("L").resize(picture.size)
    picture.putalpha(alpha)
    (result,) = editor.edit(picture, [text], size="0.06M")
    assert result.mode == "RGBA" and result.getchannel("A").tobytes() == alpha.tobytes()


def test_a_batch_equals_its_single_edits(editor, text):
    pictures = [Image.open(CAT), Image.open(CAT).rotate(180).resize((80, 200))]
    texts = [text, torch.flip(text, (0,))[:4]]
    settings = SamplingSettings(temperature=0.0)
    together = editor.edit(pictures, texts, size="0.06M", settings=settings)
    for picture, prompt, expected in zip(pictures, texts, together):
        (alone,) = editor.edit([picture], [prompt], size="0.06M", settings=settings)
        assert alone.size == picture.size and alone.tobytes() == expected.tobytes()


def test_every_scale_passes_by_and_raising_cancels(editor, text):
    seen = []

    def stop(scale, fitted):
        seen.append((scale.index, scale.count, fitted[0].source.size))
        if scale.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor.edit(CAT, [text], size="0.06M", on_scale=stop)
    assert seen == [(k, 7, (451, 300)) for k in range(3)]


def test_different_aspects_in_one_batch(editor, text):
    pictures = [Image.new("RGB", (100, 100)), Image.new("RGB", (100, 200))]
    with pytest.raises(ValueError, match="need different aspect tables; edit them one by one or fit them to squares"):
        editor.edit(pictures, [text, text], size="0.06M", method="aspect")


def test_an_instruction_without_a_text_encoder(editor):
    with pytest.raises(ValueError, match="no text encoder is loaded"):
        editor.edit(CAT, "make it red", size="0.06M")


LAYOUTS = {"8B": GOLDEN / "patchify_256.safetensors", "2B": GOLDEN / "plain_256.safetensors"}


@pytest.mark.parametrize(("size", "other"), [("8B", "2B"), ("2B", "8B")])
def test_parts_of_two_sizes_are_refused_by_the_name_of_the_right_one(size, other, tmp_path):
    """Wherever the layout of a published size meets the other's VAE, features or edit."""
    editor, foreign = (Editor.load(LAYOUTS[one], LAYOUTS[one], device="cpu") for one in (size, other))
    words, small = torch.ones(3, 256), dict(size="0.06M")
    edit = foreign.run(CAT, words, **small)
    edit.tokens.save(tmp_path / "edit.safetensors")
    editor.drafter = foreign.transformer
    right, theirs = (f" ({PUBLISHED_VAES[one]} for {one})" for one in (size, other))
    ways = {
        "load": (lambda: Editor.load(LAYOUTS[size], LAYOUTS[other], device="cpu"), right),
        "features": (lambda: editor.run(CAT, words, features=edit.tokens.total(), **small), right),
        "an edit of an edit": (lambda: editor.run(edit, words), theirs),
        "its tokens": (lambda: editor.run(edit.tokens, words), theirs),
        "its first scales": (lambda: editor.run(CAT, words, given=edit.tokens.first(3), **small), "; go on with the"),
        "its file": (lambda: decode(tmp_path / "edit.safetensors", LAYOUTS[size], device="cpu"), f"--vae{theirs}"),
        "drafter": (lambda: editor.run(CAT, words, shortcuts=Shortcuts(drafted=2), **small), "; choose another dr"),
    }
    for way, (act, advice) in ways.items():
        with pytest.raises(ValueError) as error:
            act()
        assert advice in str(error.value) and "\n" not in str(error.value), way


def test_one_negative_serves_every_picture(editor, text, monkeypatch):
    asked = []
    monkeypatch.setattr(editor, "encode_text", lambda prompts: [asked.append(p) or text for p in prompts])
    editor.edit([CAT, CAT], [text, text], "ugly", size="0.06M")
    assert asked == ["ugly", "ugly"]


def test_no_picture_and_no_such_device(editor):
    with pytest.raises(ValueError, match="there is no picture to edit"):
        editor.edit([], [], size="0.06M")
    with pytest.raises(ValueError, match="the device banana cannot be used here"):
        Editor.load("a", "b", device="banana")


def test_a_picture_known_to_be_new_is_read_without_asking(monkeypatch):
    """The editor tells the loop which pictures and prompts are new, and says nothing where it cannot know."""
    editor = Editor.load(*demo_files())
    told, original = [], Session.prefill
    monkeypatch.setattr(Session, "prefill", lambda self, batch: (told.append(batch.fresh), original(self, batch))[1])
    pictures = [Image.effect_noise((256, 256), 50 + i).convert("RGB") for i in range(2)]
    for picture, words in [(0, "a"), (0, "a"), (1, "a"), (1, "b"), (0, "b")]:
        editor.edit(
            pictures[picture], words, size="0.06M", settings=SamplingSettings(guidance=1.0), shortcuts=Shortcuts(stop=2)
        )
    assert told == [True, False, True, True, True]
    editor.forget()
    editor.edit(pictures[0], "b", size="0.06M", shortcuts=Shortcuts(stop=2))
    assert told[-1]
