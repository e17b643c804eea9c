"""DeltaProduct: a linear RNN whose transitions are products of generalized Householder matrices."""
