"""Show what a constructor takes that has its parameters from a dataclass, by ``lightning_lora.signature.takes``."""

from typing import Any

import griffe


class Takes(griffe.Extension):
    """The parameters of the dataclass, in place of the instance that the constructor is given."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """When all classes are known."""
        for module in pkg.modules.values():
            for cls in module.classes.values():
                init = cls.members.get("__init__")
                for decorator in getattr(init, "decorators", ()):
                    if str(decorator.value).startswith("takes("):
                        init.parameters = module[str(decorator.value)[len("takes(") : -1]].parameters
                        init.decorators = []
