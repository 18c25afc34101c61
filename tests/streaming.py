"""A small network as ComfyUI streams one (dynamic VRAM), with stand-ins for its pages, for `in_comfyui.py`."""

from __future__ import annotations

INFINITE = float("inf")


class Streaming:
    """The network, its patcher and its pages in one; it counts what is asked of it."""

    def __init__(self, torch, holding, layers) -> None:
        self.torch, self.holding, self.ops, self.mm = torch, holding, holding.comfy.ops, holding.mm
        torch.manual_seed(0)
        linears = [layers.Linear(4, 4, dtype=torch.float32) for _ in range(3)]
        self.network = torch.nn.Sequential(*linears, layers.LayerNorm(4, dtype=torch.float32))
        for parameter in self.network.parameters():
            torch.nn.init.normal_(parameter)
        self.layers = list(self.network)
        for number, layer in enumerate(linears):
            layer._v, layer._v_signature, layer.seed_key = (self, 100 * number, 100), None, str(number)
        self.serial, self.pins, self.filled, self.full, self.moved, self.lacking = 0, 0, [], False, 0, None
        self.patches_uuid, self.injections, self.forced_hooks, self.load_device = "a", {}, None, torch.device("cpu")
        self.model = type("Model", (), {"current_weight_patches_uuid": "a"})()
        self.dynamic, self.callbacks, self.loaded = True, [], True
        self.object_patches, self.object_patches_backup = {}, {}
        self.x, self.first = torch.randn(2, 4), None
        self.expected = self.network(self.x)
        self.holder = holding.Holder(self.network, self.load_device)

    def is_dynamic(self):
        return self.dynamic

    def get_all_callbacks(self, kind):
        return self.callbacks

    def prioritize(self):
        self.moved += 1

    def vbar_fault(self, span):
        if self.full or span[1] == self.lacking:
            return None
        self.pins += 1
        return bytearray([self.serial, span[2] % 251])

    def vbar_unpin(self, span):
        self.pins -= 1

    def fill(self, layer, **more):
        """ComfyUI's way to bring weights into their pages."""
        self.filled.append(layer.seed_key)
        if not hasattr(layer, "_v_weight"):
            layer._v_weight, layer._v_bias = (self.torch.empty_like(x) for x in (layer.weight, layer.bias))
        for page, own in ((layer._v_weight, layer.weight), (layer._v_bias, layer.bias)):
            page.copy_(own.detach())
        layer._v_signature = layer._v_signature or object()
        return layer._v_weight, layer._v_bias, None

    def hold(self, room=INFINITE):
        return self.holder.hold(self, room)

    def state(self, hold):
        """Whether all stand still, how many layers have weights in hand, pages pinned, layers filled so far."""
        return [hold.whole, sum("held" in layer.__dict__ for layer in self.layers), self.pins, len(self.filled)]

    def again(self):
        """The same of a hold without loading, and whether all lies where it lay; None where ComfyUI has to load."""
        hold = self.holder.again(self)
        if hold is None:
            return None
        with hold:
            return [*self.state(hold), hold.places == self.first.places]

    def found(self) -> dict:
        names = (("ops", "cast_bias_weight"), ("ops", "uncast_bias_weight"), ("mm", "is_device_cpu"))
        places = [*names, ("mm", "loaded_models"), ("holding", "_pages")]
        saved = [getattr(getattr(self, where), name) for where, name in places]
        stand_ins = [
            lambda layer, **more: self.fill(layer, **more), lambda *_: None, lambda device: False,
            lambda: [self] if self.loaded else [], lambda: self,
        ]  # fmt: skip
        try:
            for (where, name), stand_in in zip(places, stand_ins):
                setattr(getattr(self, where), name, stand_in)
            return {**self.whole(), **self.what_forbids(), **self.in_part(), **self.failures(), **self.static()}
        finally:
            for (where, name), real in zip(places, saved):
                setattr(getattr(self, where), name, real)
            self.holding.Holder.refused = False

    def whole(self) -> dict:
        found = {}
        with self.hold() as self.first:
            equal = self.torch.equal(self.network(self.x), self.expected)
            found["first"] = [*self.state(self.first), equal, len(self.first.places)]
        found["released"] = self.state(self.first)
        found["again"] = [self.again(), self.moved]
        self.serial += 1
        found["pages lost"] = [self.again(), self.pins]
        self.filled.clear()
        with self.hold() as second:
            found["filled anew"] = [*self.state(second), second.places == self.first.places]
        self.first = second
        place = self.holder.kept[id(self.layers[3]), "weight"].data_ptr()
        ones = self.torch.nn.Parameter(self.torch.ones(4), requires_grad=False)
        self.layers[3].weight = ones  # at another place at every load
        with self.hold():
            weight, _ = self.layers[3].held
            found["small"] = [weight.data_ptr() == place, weight.tolist()]
        return found

    def what_forbids(self) -> dict:
        """Holding without loading, by what has changed since."""
        found = {}
        changes = {
            "nothing": (lambda: None, lambda: None),
            "patches": (lambda: setattr(self, "patches_uuid", "b"), lambda: setattr(self, "patches_uuid", "a")),
            "loaded": (lambda: setattr(self, "loaded", False), lambda: setattr(self, "loaded", True)),
            "callbacks": (lambda: self.callbacks.append(1), self.callbacks.clear),
            "injections": (lambda: self.injections.update(x=1), self.injections.clear),
            "objects": (lambda: self.object_patches.update(x=1), self.object_patches.clear),
            "memory": (lambda: setattr(self, "full", True), lambda: setattr(self, "full", False)),
            "a layer's LoRA": (lambda: setattr(self.layers[1], "_v_signature", None), lambda: None),
        }
        for name, (change, back) in changes.items():
            change()
            found[f"changed: {name}"] = [self.again() is None, self.pins, self.holder.busy]
            back()
        self.filled.clear()
        with self.hold() as hold:
            found["refilled"] = self.state(hold)
        return found

    def in_part(self) -> dict:
        found, layer = {}, self.layers[2]
        self.full = True
        with self.hold() as hold:
            found["no room"] = self.state(hold)
        self.full = False
        with self.hold(299) as hold:
            found["too little room"] = self.state(hold)
        whole, self.holding.STEP = self.holding.STEP, 120
        with self.hold() as hold:
            found["in steps"] = [hold.whole, hold.pinned == [(self, 0, 120), (self, 120, 120), (self, 240, 60)]]
        found["in steps, again"] = self.again()
        self.lacking = 240
        with self.hold() as hold:
            found["no room for the last step"] = self.state(hold)
        self.lacking, self.holding.STEP = None, whole
        layer.weight_function = [lambda weight: weight]
        with self.hold() as hold:
            found["a function on a weight"] = [*self.state(hold), hasattr(layer, "_prefetch")]
        found["taken back"] = [self.pins, hasattr(layer, "_prefetch")]
        layer.weight_function = []
        return found

    def failures(self) -> dict:
        found = {}
        for name, error in (("interrupt", KeyboardInterrupt()), ("memory", RuntimeError("out of memory"))):
            self.layers[0]._v_signature = None

            def fails(layer, error=error, **more):
                layer._prefetch = {"signature": self.vbar_fault(layer._v)}  # as ComfyUI leaves it
                raise error

            self.ops.cast_bias_weight = fails
            try:
                self.hold()
            except BaseException as raised:
                left = any("_prefetch" in layer.__dict__ for layer in self.layers)
                found[f"failed: {name}"] = [raised is error, self.pins, self.holder.busy, left]

        def lost(layer, **more):
            self.fill(layer)
            layer._v_signature = None  # its pages were given to others meanwhile
            return layer._v_weight, layer._v_bias, None

        self.ops.cast_bias_weight = lost
        with self.hold() as hold:
            found["pages given away"] = [*self.state(hold)[:3], self.holding.Holder.refused]

        def unknown(layer, **more):
            raise TypeError("another ComfyUI")

        self.ops.cast_bias_weight = unknown
        with self.hold() as hold:
            found["unknown"] = [*self.state(hold)[:3], self.holding.Holder.refused, self.again()]
        return found

    def static(self) -> dict:
        """Of a model that ComfyUI moves as a whole."""
        self.holding.Holder.refused, self.dynamic = False, False
        for layer in self.layers:
            layer.__dict__.pop("_v", None)
        with self.hold() as self.first:
            weight, own = self.layers[0].held[0], self.layers[0].weight
            found = {"static": self.state(self.first)[:3]}
            found["static, apart"] = [weight is not own, weight.data_ptr() == own.data_ptr()]
        found["static again"] = self.again()[:3]
        self.layers[0].prev_comfy_cast_weights = False  # as ComfyUI marks a layer that it moves at every call
        with self.hold() as hold:
            found["static in part"] = [*self.state(hold)[:3], self.again()]
        return found
