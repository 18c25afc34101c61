"""ShapeEdit: a procedural benchmark of instruction-based editing with exact answers."""
