"""What changes in the graph: a pass edits a captured `torch.fx.GraphModule` in place and says how many places changed.

A pass takes its few numbers, never the recipe, and touches nothing but the graph; what it draws at random is keyed.
"""
