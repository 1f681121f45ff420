"""Inputs of a simulation: model shapes, fleet traces, faults, and the cost model."""
