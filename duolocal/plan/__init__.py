"""What a model, a context and settings take, in bytes and in time, before anything is loaded.

`memory` and `transient` are the arithmetic that the engine refuses by; `weights` knows sizes from headers and shapes;
`dials` chooses what is left open; `fitting` finds other settings that fit; `rates` and `cards` know how fast;
`duration` what that comes to.
"""
