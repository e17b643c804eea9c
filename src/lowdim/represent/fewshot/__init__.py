"""SLK: transductive few-shot learning by clustering, with the labelled points held and neighbours pulled together."""
