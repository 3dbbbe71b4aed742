"""The style that all pictures of benchmarks share, for light and dark pages."""

STYLE = """
  .panel { fill: #ffffff; stroke: #d0d7de }
  .ink { fill: #1f2328 }
  .soft { fill: #59636e }
  .grid { stroke: #d0d7de; stroke-opacity: .6 }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #151b23; stroke: #3d444d }
    .ink { fill: #f0f6fc }
    .soft { fill: #9198a1 }
    .grid { stroke: #3d444d }
  }
"""
