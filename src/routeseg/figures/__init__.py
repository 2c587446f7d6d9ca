"""Pictures of what the network does: label maps, routes, training runs, costs. Draws only.

labels.py has the label maps, contact_sheet.py many of them on a page, routes.py the routes, charts.py training runs and
evaluations, comparison.py networks beside each other, route_statistics.py the routes over a data set, latency.py
milliseconds.
"""

from routeseg.figures.charts import class_iou_bars, cost_histogram, learning_curves
from routeseg.figures.common import picture_kind, png_bytes
from routeseg.figures.comparison import accuracy_cost
from routeseg.figures.contact_sheet import Section, contact_sheet
from routeseg.figures.labels import MIN_PICTURE, colorize, legend_entries, overlay
from routeseg.figures.latency import latency_scatter
from routeseg.figures.route_statistics import edge_frequency, edge_strength, extreme_routes, group_frequencies
from routeseg.figures.routes import draw_route, route_grid, route_picture, routes_side_by_side, save_route

__all__ = [
    "MIN_PICTURE",
    "Section",
    "accuracy_cost",
    "class_iou_bars",
    "colorize",
    "contact_sheet",
    "cost_histogram",
    "draw_route",
    "edge_frequency",
    "edge_strength",
    "extreme_routes",
    "group_frequencies",
    "latency_scatter",
    "learning_curves",
    "legend_entries",
    "overlay",
    "picture_kind",
    "png_bytes",
    "route_grid",
    "route_picture",
    "routes_side_by_side",
    "save_route",
]
