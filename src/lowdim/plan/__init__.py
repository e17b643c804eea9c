"""Memory and time, predicted from shapes before anything is allocated, and measured when it is."""

from lowdim.plan.fake import faked
from lowdim.plan.fitting import Fit, fit
from lowdim.plan.forecasting import Forecast, affordable, forecast
from lowdim.plan.measuring import Measured, PeakMemory, measure
from lowdim.plan.tables import Touched, fit_table, shows, table
from lowdim.plan.unreached import unreached

__all__ = [
    "Fit",
    "Forecast",
    "Measured",
    "PeakMemory",
    "Touched",
    "affordable",
    "faked",
    "fit",
    "fit_table",
    "forecast",
    "measure",
    "shows",
    "table",
    "unreached",
]
