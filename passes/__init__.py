"""The compiler: tracing, the algebra of convolutions, regions, surgery and the numeric proof."""
