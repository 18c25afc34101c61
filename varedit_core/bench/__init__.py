"""`varedit bench`: seconds and memory of edits with models of the published sizes and random weights."""
