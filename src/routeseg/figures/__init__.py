"""Images of what the network does: label maps, routes, training runs, costs. Draws only.

labels.py has the label maps, effort.py how far places went, sheet.py many of them on a page, routes.py the routes,
charts.py training runs and evaluations, comparison.py networks beside each other, route_statistics.py the routes over a
data set.

The public names and their homes: `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
