"""The gateway: everything HTTP that is not a WebSocket, on the internal port.

It has a process of its own, so that health and metrics are answered whatever the workers do, and it
keeps no state: whether the pool is ready is asked of the supervisor, what was counted is read from
the metric files of all processes.

    __main__      what the supervisor starts: settings, signals, order of start and end
    serve         Hypercorn, kept running, and its end with a deadline
    front         around every request: limits, request id, access log, counting
    body          the body of a request, read to its end whether anybody wants it or not
    app           the routes
    problem       what is answered to what cannot be served
    api, api_keys, publish_request, life_page
                  publishing, and what became of it; who may ask
    probe         one question for all who ask at the same time
    redis_watch   whether Redis answers
    user_count    how many users the fleet has
    scrape        metric files in, sums out
    usage         what processes use of the machine
    pool_metrics  metrics that nobody counts: they are looked up
    metrics_page  the pages made of all this
    metrics_docs  the page of the documentation
"""
