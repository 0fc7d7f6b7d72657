"""The demonstration: all three methods in the lab's world, on a CPU, without a network.

``chain`` writes what ``fusion run`` carries out, ``results`` makes the tables and the plot of what came out.
"""
