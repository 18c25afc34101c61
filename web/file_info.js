// Shows the text that a node of this pack returns on the node; ComfyUI's page does so for its own text nodes only.
import { app } from "../../scripts/app.js";

const SHOWN = new Set(["VAREditFileInfo", "VAREditMemoryPlan", "VAREditSaveTokens"]);

function addTextBox(node) {
  const box = document.createElement("textarea");
  box.className = "comfy-multiline-input";
  box.readOnly = true;
  // A result, not an input: neither saved with the graph nor sent with a prompt.
  const widget = node.addDOMWidget("shown", "VAREDIT_TEXT", box, { serialize: false, getMinHeight: () => 200 });
  widget.serialize = false;
  node.setSize([Math.max(node.size[0], 460), node.computeSize()[1]]);
  return box;
}

app.registerExtension({
  name: "VAREdit.ShownText",
  nodeCreated(node) {
    if (!SHOWN.has(node.comfyClass)) return;
    const box = addTextBox(node);
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      box.value = output?.text?.join("\n") ?? "";
    };
  },
});
