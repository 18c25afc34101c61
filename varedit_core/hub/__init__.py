"""Published weights by their name: `get("8B-512")` has them here, `Editor.load(*find("8B-512"))` loads them.

`catalogue` says which there are, `remote` asks the hub, `fetching` brings the two together, `places` and `manifest` say
where weights lie and what they were made of, `card` describes them for others. Only `remote` needs `huggingface_hub`.
"""

from .fetching import get, plan
from .finding import find

__all__ = ["find", "get", "plan"]
