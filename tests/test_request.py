"""What `Editor.run` takes by name: wrong values are a sentence before anything runs, usual forms are understood."""

import copy
import os
import pickle
import signal
import time
from threading import Event, Thread

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from varedit_core import Controls, Editor, Region, SamplingSettings, Shortcuts
from varedit_core.demo import demo_files
from varedit_core.request import Options

SIZE = "0.06M"
WORDS = "make it sepia"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PICTURE = Image.new("RGB", (64, 64), (90, 140, 40))
WRONG = [
    *((dict(variations=n), rf"variations must be a whole number from 1 to 4096, got {n!r}") for n in (0, -1, 1.5, "2")),
    (dict(variations=True), "variations must be a whole number from 1 to 4096, got True"),
    *((dict(seam=n), rf"seam must be a whole number from 0 to 4096, got {n!r}") for n in (-1, 0.5, None)),
    (dict(controls={"strength": 0.5}), "controls must be Controls, got dict"),
    (dict(controls=Shortcuts()), "controls must be Controls, got Shortcuts"),
    (dict(shortcuts=4), "shortcuts must be Shortcuts, got int"),
    (dict(given=[torch.ones(1)]), "given must be Tokens, got list"),
    (dict(steer=[Controls()]), "steer must be functions of a scale, got Controls"),
    (dict(regions=["make it red"]), "regions must be Region, got str"),
    *(
        (more, f"a picture is a path, bytes, an open file, a PIL image, or an array or tensor of one, got {kind}")
        for more, kind in (
            (dict(mask=5), "int"),
            (dict(mask=[None]), "NoneType"),
            (dict(regions=[Region("make it red", 5)]), "int"),
        )
    ),
    (dict(features=np.ones((1, 14, 32, 32))), "features must be Tensor, got ndarray"),
    (dict(features=torch.ones(2, 14, 32, 32)), "features are of 2 pictures, but there is 1 picture; give one each"),
    (dict(negatives=3), "negative prompt must be words, or text features of encode_text, got int"),
    (dict(negatives=[None]), "negative prompt must be words, or text features of encode_text, got NoneType"),
    (dict(regions=Region(None)), "the instruction of a region must be words, or text features of encode_text, got .*"),
    (dict(variations=torch.tensor(1.0)), r"variations must be a whole number from 1 to 4096, got tensor\(1.\)"),
    (dict(settings={"guidance": 2}), "settings must be SamplingSettings, got dict"),
]


@pytest.fixture(scope="module")
def editor():
    return Editor.load(*demo_files(), device="cpu")


@pytest.mark.parametrize(("options", "said"), WRONG, ids=str)
def test_a_wrong_option_is_one_sentence(editor, options, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        editor.run(PICTURE, WORDS, size=SIZE, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(seed=3), r"no option 'seed'; write settings=SamplingSettings\(seed=...\)"),
        (dict(guidance=2), r"no option 'guidance'; write settings="),
        (dict(masks=1), "no option 'masks'; choose of .*mask"),
    ],
    ids=str,
)
def test_an_option_that_there_is_not(editor, options, said):
    with pytest.raises(TypeError, match=said):
        editor.run(PICTURE, WORDS, **options)


def test_who_watches_is_a_function(editor):
    with pytest.raises(ValueError, match="on_scale must be a function of a scale and pictures, got int"):
        editor.run(PICTURE, WORDS, on_scale=5)


def test_a_result_carries_what_its_picture_does(editor, tmp_path):
    exif = Image.Exif()
    exif[0x013B] = "A. Painter"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "{}")
    PICTURE.save(tmp_path / "a.png", exif=exif, dpi=(300, 300), pnginfo=texts, icc_profile=SRGB)
    (made,) = editor.edit(tmp_path / "a.png", WORDS)
    with Image.open(tmp_path / "a.png") as given:
        given.load()
        for name in ("exif", "prompt", "icc_profile"):
            assert made.info[name] == given.info[name], name
        assert round(made.info["dpi"][0]) == 300


def test_a_mask_that_changes_while_it_is_used(editor):
    mask = Image.new("L", PICTURE.size)
    mask.paste(255, (0, 0, 32, 64))
    (wanted,) = editor.edit(PICTURE, WORDS, mask=mask)

    def change(scale, pictures):
        mask.paste(0, (0, 0, *mask.size))

    (found,) = editor.edit(PICTURE, WORDS, mask=mask, on_scale=change)
    assert found.tobytes() == wanted.tobytes() != PICTURE.tobytes()


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_editor_is_not_copied(editor, copied):
    with pytest.raises(TypeError, match="an Editor belongs to its process"):
        copied(editor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_while_a_thread_edits_can_edit(editor):
    begun, go_on = Event(), Event()

    def wait(scale, pictures):
        begun.set()
        assert go_on.wait(60)

    thread = Thread(target=editor.edit, args=(PICTURE, WORDS), kwargs={"on_scale": wait})
    thread.start()
    assert begun.wait(60)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(7 if editor.edit(PICTURE, WORDS) else 1)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert ended and os.waitstatus_to_exitcode(status) == 7


@pytest.mark.parametrize("words", [None, 3, [None], [], ()])
def test_words_that_are_none(editor, words):
    with pytest.raises(ValueError, match="^(instruction must be words, or text|there is no instruction; say what)"):
        editor.run(PICTURE, words, size=SIZE)
    with pytest.raises(ValueError, match="a picture is a path, bytes, an open file, a PIL image, or .* of one, got"):
        editor.run(words and words[0] if isinstance(words, list) and words else 3, WORDS, size=SIZE)


def test_a_blank_negative_prompt_is_none(editor):
    blank, none = (editor.run(PICTURE, WORDS, negatives, SIZE).pictures[0] for negatives in (" ", ""))
    assert blank.tobytes() == none.tobytes()


def test_a_region_that_the_model_cannot_see(editor):
    """Of a long thin picture a single white pixel of a large mask."""
    mask = Image.new("L", (16000, 40))
    mask.putpixel((100, 10), 255)
    with pytest.raises(ValueError, match="the mask of region 2 is too small to be seen at the model's size"):
        regions = [Region(WORDS), Region("make it a duotone", mask)]
        editor.run(Image.new("RGB", (4000, 10)), size=SIZE, regions=regions)


def test_a_picture_that_is_none_and_words_that_are_no_list(editor):
    with pytest.raises(ValueError, match="^an array of floating-point numbers must be from 0 to 1, got 2 to 2$"):
        editor.run([np.full((64, 64, 3), 2.0)], WORDS, size=SIZE)
    with pytest.raises(ValueError, match="encode_text takes a list of prompts; write .'make it sepia'."):
        editor.encode_text(WORDS)


def test_a_size_has_two_names(editor):
    sizes = [editor.fit(PICTURE, size).schedule for size in (SIZE, "256", 256)]
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("count", [0, 1.5])
def test_so_it_is_in_the_loop(editor, count):
    features, texts = editor.encode([editor.fit(PICTURE, SIZE)], [WORDS])
    with pytest.raises(ValueError, match="variations must be a whole number from 1 to 4096"):
        next(editor.sample(features, texts, editor.fit(PICTURE, SIZE).schedule, variations=count))


def test_none_is_the_default_and_one_thing_needs_no_list(editor):
    def double(scale):
        scale.log_odds = scale.log_odds * 2

    region = Region(WORDS)
    plain, one = Options(), Options(controls=None, shortcuts=None, given=None, steer=double, regions=region)
    assert (one.controls, one.shortcuts) == (plain.controls, plain.shortcuts)
    assert one.steer == (double,) and one.regions == (region,)
    edited = editor.run(PICTURE, WORDS, size=SIZE, shortcuts=Shortcuts(stop=3))
    on = [editor.run(PICTURE, WORDS, size=SIZE, given=given).tokens for given in (edited, edited.tokens)]
    assert len(edited.tokens) == 3 and all(map(torch.equal, on[0].bits, on[1].bits))


def test_knobs_that_do_nothing_are_refused_unless_they_are_allowed(editor):
    options = dict(size=SIZE, controls=Controls(score="near"))
    with pytest.raises(ValueError, match="score counts only with best_of"):
        editor.run(PICTURE, WORDS, **options)
    settings = SamplingSettings(guidance=1.0)
    (wanted,), (found,) = (
        editor.run(PICTURE, WORDS, settings=settings, **more).pictures
        for more in (dict(size=SIZE), dict(options, idle=True))
    )
    assert found.tobytes() == wanted.tobytes()
