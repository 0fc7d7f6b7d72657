"""Makes stock mergekit know our methods. It discovers no plugins, so we act when it is imported.

``fusion_plugins_mergekit.pth`` calls :func:`install` whenever a Python interpreter of the environment starts. That adds
one finder to ``sys.meta_path`` which waits for the modules of :data:`HOOKS`; when one has been imported, it calls our
function with the module. An interpreter that never imports mergekit pays for one dictionary look-up per import. So this
file imports only modules that every interpreter has loaded anyway, and it has no type annotations that would need
``typing``. An error in a hook is a warning: mergekit itself must keep working.
"""

import sys

#: mergekit module -> (our module, function that is called with the imported mergekit module)
HOOKS = {
    "mergekit.merge_methods.registry": ("fusion_plugins.mergekit.methods", "register_methods"),
    "mergekit.merge": ("fusion_plugins.mergekit.patches", "extend_merge"),
    "mergekit.scripts.merge_raw_pytorch": ("fusion_plugins.mergekit.patches", "extend_raw_merge"),
}


class _Finder:
    """Finds the modules of :data:`HOOKS`, once each, through the other finders."""

    def __init__(self, pending):
        self.pending = pending

    def find_spec(self, name, path=None, target=None):
        if name not in self.pending:
            return None
        hook = self.pending.pop(name)
        if not self.pending:
            sys.meta_path.remove(self)
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            # Not this finder, which would report the module as missing now that it is no longer pending.
            spec = find_spec(name, path, target) if finder is not self and find_spec is not None else None
            if spec is not None:
                if spec.loader is not None:
                    _call_after(spec.loader, hook)
                return spec
        return None


def install():
    """Wait for mergekit's modules, or act at once on those that are imported already."""
    pending = dict(HOOKS)
    for name in HOOKS:
        if name in sys.modules:
            _run(pending.pop(name), sys.modules[name])
    if pending and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(pending))


def _call_after(loader, hook):
    """Call the hook when the loader has executed its module. The import system makes a new loader for every module."""
    execute = loader.exec_module

    def exec_module(module):
        loader.exec_module = execute
        execute(module)
        _run(hook, module)

    loader.exec_module = exec_module


def _run(hook, module):
    spec = getattr(sys.modules.get(hook[0]), "__spec__", None)
    if getattr(spec, "_initializing", False):
        # Our module is half imported: it was imported before mergekit, and its own imports load mergekit now. Only
        # methods.py can be in this state; it registers the methods itself when it is complete.
        return
    try:
        ours = __import__(hook[0], fromlist=[hook[1]])
        getattr(ours, hook[1])(module)
    except Exception as error:
        import warnings

        from fusion_plugins.install import install_command

        warnings.warn(
            f"fusion_plugins could not extend {module.__name__}: {type(error).__name__}: {error}. mergekit works as "
            f"without fusion_plugins. Expected mergekit >=0.1.5,<0.2: {install_command('mergekit')}",
            RuntimeWarning,
            stacklevel=2,
        )
