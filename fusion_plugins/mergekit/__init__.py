"""mergekit: the methods `varm` and `fusechat_sce`, the record of a merge, and the check before one.

``_autoload`` brings our part into stock mergekit: ``methods`` into its registry, ``patches`` around its planner.
``plan`` and ``unit_sums`` extend the plan of a merge, ``record`` writes down what it did, ``report`` draws that.
``check``, ``checkpoints`` and ``ignored_keys`` are behind ``fusion merge-check``; ``commands`` has the command line.
"""
