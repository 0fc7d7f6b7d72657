"""mergekit: the methods `varm` and `fusechat_sce`, the record of a merge, and the check before one.

``_autoload`` brings our part into stock mergekit: ``methods`` into its registry, ``patches`` around its planner.
``plan`` and ``unit_sums`` extend the plan of a merge, ``record`` writes down what it did, ``report`` draws that.
``checkpoints``, ``quantized``, ``adapters`` and ``rehearsal`` find what no merge can do, for a merge with our methods
and for ``fusion merge-check``. Behind that command are also ``check``, ``compare``, ``check_plan``, ``findings`` and
``ignored_keys``; ``commands`` has the command line.
"""
