"""Costs of programs: plans compiled for absent accelerators, measurements on the present device."""
