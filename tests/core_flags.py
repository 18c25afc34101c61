"""An edit under every start-up flag of ComfyUI that changes numbers, memory or attention; run as a script by ComfyUI's
own Python.

Prints what came of it as JSON. `test_core_nodes.py` judges it. Flags that ComfyUI heeds only while it starts are given
as arguments, and the process is under them; the others are switched in one process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from in_comfyui import Probe


class Flags(Probe):
    def flags(self) -> list[str]:
        """The names of all that ComfyUI's command line knows."""
        from comfy.cli_args import parser

        return sorted(action.dest for action in parser._actions if action.dest != "help")

    def edited(self):
        """A picture by everything loaded anew."""
        torch = self.torch
        model = self.run("ModelLoader", "varedit_demo.safetensors", "auto")
        clip = self.run("TextEncoderLoader", "varedit_demo_t5.safetensors")
        vae = self.run("VAELoader", "varedit_demo_tokenizer.safetensors")
        source = self.run("SourceEncode", vae, self.cat, "256", "square")
        text = self.run("TextEncode", clip, "make it sepia")
        latent = self.nodes["VAREditSampler"].execute(model, source, text, 0, 2.0, 0.0).result[0]
        picture = self.run("Decode", vae, latent)
        return picture.to("cpu", torch.float32)

    def under(self, names) -> dict:
        """For every flag the error of 8-bit levels (PSNR) to the picture without it, or the message; its class and
        message are apart."""
        from comfy.cli_args import args

        found, plain = {}, self.edited()
        for name in names:
            dest, _, value = name.partition("=")
            before = getattr(args, dest)
            setattr(args, dest, int(value) if value else True)
            try:
                difference = (self.edited() - plain).square().mean().item()
                found[name] = 99.0 if not difference else -10 * self.torch.tensor(difference).log10().item()
            except ValueError as error:
                found[name] = str(error)
            except Exception:
                found[name] = {"failed": traceback.format_exc()}
            finally:
                setattr(args, dest, before)
            print(name, found[name], file=sys.stderr, flush=True)
        return found


if __name__ == "__main__":
    sys.path[:] = [os.getcwd(), *sys.path, str(Path(__file__).parents[1])]
    from comfy.cli_args import args

    args.cpu = True
    scratch, names, *started = sys.argv[1:]
    for name in started:
        setattr(args, name, True)
    import torch

    with torch.inference_mode():
        run = Flags(Path(scratch))
        found = {"flags": run.flags(), "under": run.under(names.split(",") if names else [])}
        picture = run.edited()
    print(json.dumps({**found, "mean": picture.mean(dim=(0, 1, 2)).tolist(), "sum": picture.double().sum().item()}))
