// Keeps the pictures that these nodes show when the page is reloaded; ComfyUI's page has them in memory only.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const SHOWN = new Set(["VAREditScalePreview", "VAREditSampleImage", "VAREditSweep"]);
const KEPT = "shown_pictures"; // property of a node: what names its pictures to the server

const tracker = () => app.extensionManager?.workflow?.activeWorkflow?.changeTracker;

// The page saves a graph by itself, but does not look whether a run has changed it.
function saveGraph() {
  const { captureCanvasState, checkState } = tracker() ?? {};
  (captureCanvasState ?? checkState)?.call(tracker());
}

// ComfyUI deletes its temporary files when it starts.
async function isThere(picture) {
  try {
    return (await api.fetchApi(`/view?${new URLSearchParams(picture)}`, { method: "HEAD" })).ok;
  } catch {
    return false;
  }
}

function show(node, images) {
  const { id, graph } = node;
  const key = (graph.rootGraph ?? graph) === graph ? id : `${graph.id}:${id}`;
  app.nodeOutputs[key] ??= { images };
  if (LiteGraph.vueNodesMode) {
    // "Nodes 2.0" shows a copy of these outputs, which is made when a tab is left and entered again.
    tracker()?.store?.();
    tracker()?.restore?.();
  }
  node.setDirtyCanvas(true);
}

app.registerExtension({
  name: "VAREdit.KeptPictures",
  nodeCreated(node) {
    if (!SHOWN.has(node.comfyClass)) return;
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (!output?.images) return;
      this.properties[KEPT] = output.images;
      saveGraph();
    };
  },
  async loadedGraphNode(node) {
    const kept = SHOWN.has(node.comfyClass) && node.properties[KEPT];
    if (!Array.isArray(kept)) return;
    const there = await Promise.all(kept.map(isThere));
    const images = kept.filter((_, i) => there[i]);
    if (node.graph?.getNodeById(node.id) !== node) return; // another graph was opened meanwhile
    if (images.length) show(node, images);
    else delete node.properties[KEPT];
  },
});
